// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client's event file descriptors, as an [`InterruptSink`] for the device's threads.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwapOption;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};
use rustix::io::Errno;
use std::os::fd::AsRawFd;
use vfio_bindings::bindings::vfio;
use vgpu::function::InterruptSink;

use super::wire::{IrqAction, IrqInfo};

/// An event file descriptor that is safe to signal: writing to it does nothing else and does not block.
struct Event(OwnedFd);

impl Event {
    /// A client could send a pipe that is full, or a file worth overwriting; only an eventfd is taken.
    fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let target = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
        if target.as_bytes() != b"anon_inode:[eventfd]" {
            return Err(Errno::INVAL);
        }
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    fn signal(&self) {
        // The flags are the file's, not ours alone: a client may have made it blocking again, and a device's thread that is blocked
        // here with a lock held is a device that stands. A counter at its end says that the earlier signals are yet to be seen.
        let mut ready = [PollFd::new(&self.0, PollFlags::OUT)];
        if matches!(poll(&mut ready, Some(&Timespec::default())), Ok(1)) {
            let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
        }
    }
}

/// Interrupts of one kind.
struct Kind {
    index: u32,
    slots: Vec<ArcSwapOption<Event>>,
    /// Slots in use, counted from 0 to the last one: MSI has fewer when the guest granted fewer.
    used: AtomicUsize,
}

impl Kind {
    fn new(index: u32, count: u16) -> Self {
        Self { index, slots: (0..count).map(|_| ArcSwapOption::empty()).collect(), used: AtomicUsize::new(0) }
    }

    fn signal(&self, slot: usize) {
        if let Some(event) = self.slots.get(slot).and_then(|slot| slot.load_full()) {
            event.signal();
        }
    }

    fn recount(&self) {
        let used = self.slots.iter().rposition(|slot| slot.load().is_some()).map_or(0, |last| last + 1);
        self.used.store(used, Ordering::Release);
    }
}

/// What the client wants to be told of, and how. Raising takes no lock.
pub struct Interrupts {
    kinds: Vec<Kind>,
}

impl Interrupts {
    /// For a function with so many vectors. MSI is always offered.
    #[must_use]
    pub fn new(vectors: u16, msix: bool) -> Arc<Self> {
        let msi = vectors.clamp(1, 32).next_power_of_two();
        let msix = if msix { vectors } else { 0 };
        let counts: [(u32, u16); vfio::VFIO_PCI_NUM_IRQS as usize] = [
            (vfio::VFIO_PCI_INTX_IRQ_INDEX, 0),
            (vfio::VFIO_PCI_MSI_IRQ_INDEX, msi),
            (vfio::VFIO_PCI_MSIX_IRQ_INDEX, msix),
            (vfio::VFIO_PCI_ERR_IRQ_INDEX, 1),
            (vfio::VFIO_PCI_REQ_IRQ_INDEX, 1),
        ];
        Arc::new(Self { kinds: counts.into_iter().map(|(index, count)| Kind::new(index, count)).collect() })
    }

    /// How many kinds there are.
    #[must_use]
    pub fn kinds(&self) -> u32 {
        vfio::VFIO_PCI_NUM_IRQS
    }

    /// Describes a kind.
    ///
    /// # Errors
    /// `EINVAL` if there is no such kind.
    pub fn info(&self, index: u32) -> Result<IrqInfo, Errno> {
        let count = u32::try_from(self.kind(index)?.slots.len()).unwrap_or(0);
        let flags = if count == 0 { 0 } else { vfio::VFIO_IRQ_INFO_EVENTFD };
        let argsz = u32::try_from(size_of::<IrqInfo>()).unwrap_or(0);
        Ok(IrqInfo { argsz: argsz.into(), flags: flags.into(), index: index.into(), count: count.into() })
    }

    /// Carries a client's wish out, all of it or nothing.
    ///
    /// # Errors
    /// `EINVAL` if it names what there is not, or comes with the wrong file descriptors.
    pub fn set(
        &self,
        index: u32,
        start: u32,
        count: u32,
        action: IrqAction<'_>,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        let kind = self.kind(index)?;
        let (start, count) = (start as usize, count as usize);
        let end = start.checked_add(count).ok_or(Errno::INVAL)?;
        let range = kind.slots.get(start..end).ok_or(Errno::INVAL)?;
        match action {
            IrqAction::Eventfds if fds.is_empty() => range.iter().for_each(|slot| slot.store(None)),
            IrqAction::Eventfds => {
                if fds.len() != count {
                    return Err(Errno::INVAL);
                }
                let events = fds.into_iter().map(Event::new).collect::<Result<Vec<_>, _>>()?;
                for (slot, event) in range.iter().zip(events) {
                    slot.store(Some(Arc::new(event)));
                }
            }
            IrqAction::Trigger if start == 0 && count == 0 => {
                kind.slots.iter().for_each(|slot| slot.store(None))
            }
            IrqAction::Trigger => (start..end).for_each(|slot| kind.signal(slot)),
            IrqAction::TriggerIf(bytes) => {
                (start..end)
                    .zip(bytes)
                    .filter(|(_, byte)| **byte != 0)
                    .for_each(|(slot, _)| kind.signal(slot));
            }
        }
        kind.recount();
        Ok(())
    }

    /// Forgets everything: the client is gone.
    pub fn clear(&self) {
        for kind in &self.kinds {
            kind.slots.iter().for_each(|slot| slot.store(None));
            kind.recount();
        }
    }

    /// Raises each vector whose bit is set.
    pub fn raise_all(&self, mut bits: u32) {
        while bits != 0 {
            #[allow(clippy::cast_possible_truncation, reason = "below 32")]
            self.raise(bits.trailing_zeros() as u16);
            bits &= bits - 1;
        }
    }

    fn kind(&self, index: u32) -> Result<&Kind, Errno> {
        self.kinds.iter().find(|kind| kind.index == index).ok_or(Errno::INVAL)
    }

    fn used(&self, index: u32) -> Option<(&Kind, usize)> {
        let kind = self.kind(index).ok()?;
        let used = kind.used.load(Ordering::Acquire);
        (used > 0).then_some((kind, used))
    }
}

impl InterruptSink for Interrupts {
    fn raise(&self, vector: u16) {
        if let Some((msix, _)) = self.used(vfio::VFIO_PCI_MSIX_IRQ_INDEX) {
            msix.signal(vector.into());
        } else if let Some((msi, used)) = self.used(vfio::VFIO_PCI_MSI_IRQ_INDEX) {
            // A guest that granted fewer messages than there are vectors shares them.
            msi.signal(usize::from(vector) % used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK).unwrap()
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    const MSI: u32 = vfio::VFIO_PCI_MSI_IRQ_INDEX;
    const MSIX: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;

    #[test]
    fn a_vector_reaches_its_eventfd_and_only_it() {
        let interrupts = Interrupts::new(3, true);
        let fds = [event(), event(), event()];
        let clones = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        interrupts.set(MSIX, 0, 3, IrqAction::Eventfds, clones).unwrap();
        interrupts.raise(1);
        interrupts.raise_all(0b110);
        interrupts.raise(77);
        assert_eq!(fds.each_ref().map(count), [0, 2, 1]);
        interrupts.set(MSIX, 1, 1, IrqAction::Eventfds, vec![]).unwrap();
        interrupts.raise_all(0b111);
        assert_eq!(fds.each_ref().map(count), [1, 0, 1]);
        interrupts.set(MSIX, 0, 0, IrqAction::Trigger, vec![]).unwrap();
        interrupts.raise_all(0b111);
        assert_eq!(fds.each_ref().map(count), [0, 0, 0]);
    }

    #[test]
    fn a_client_cannot_make_a_signal_block() {
        let interrupts = Interrupts::new(1, true);
        let fd = event();
        interrupts.set(MSIX, 0, 1, IrqAction::Eventfds, vec![fd.try_clone().unwrap()]).unwrap();
        fcntl_setfl(&fd, fcntl_getfl(&fd).unwrap() - OFlags::NONBLOCK).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (done, finished) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            interrupts.raise(0);
            let _ = done.send(());
        });
        let waited = finished.recv_timeout(std::time::Duration::from_secs(5));
        assert!(waited.is_ok(), "raising an interrupt blocks");
        assert_eq!(count(&fd), u64::MAX - 1);
    }

    #[test]
    fn msi_vectors_fold_into_those_granted() {
        let interrupts = Interrupts::new(3, true);
        assert_eq!(interrupts.info(MSI).unwrap().count.get(), 4);
        let fd = event();
        interrupts.set(MSI, 0, 1, IrqAction::Eventfds, vec![fd.try_clone().unwrap()]).unwrap();
        interrupts.raise_all(0b111);
        assert_eq!(count(&fd), 3);
        interrupts.set(MSI, 0, 1, IrqAction::TriggerIf(&[1]), vec![]).unwrap();
        assert_eq!(count(&fd), 1);
        interrupts.clear();
        interrupts.raise(0);
        assert_eq!(count(&fd), 0);
    }

    #[test]
    fn only_eventfds_are_taken_and_all_or_none() {
        let interrupts = Interrupts::new(2, true);
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(interrupts.set(MSIX, 0, 2, IrqAction::Eventfds, vec![event(), writer]), Err(Errno::INVAL));
        assert!(interrupts.used(MSIX).is_none());
        assert_eq!(interrupts.set(MSIX, 0, 2, IrqAction::Eventfds, vec![event()]), Err(Errno::INVAL));
        assert_eq!(interrupts.set(MSIX, 1, 2, IrqAction::Trigger, vec![]), Err(Errno::INVAL));
        assert_eq!(interrupts.set(MSIX, u32::MAX, u32::MAX, IrqAction::Trigger, vec![]), Err(Errno::INVAL));
        assert_eq!(interrupts.set(9, 0, 0, IrqAction::Trigger, vec![]), Err(Errno::INVAL));
        let without = Interrupts::new(2, false);
        assert_eq!(without.info(MSIX).unwrap().count.get(), 0);
    }
}
