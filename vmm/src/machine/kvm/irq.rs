// SPDX-License-Identifier: MIT OR Apache-2.0
//! Message-signalled interrupts: vectors as event file descriptors that KVM routes.
//!
//! Raising takes no lock and never blocks. Locks, in order: [`Messages::setup`], then [`Routes::table`] or whatever
//! [`Outside`] locks.
//!
//! The vectors of a passed-through device are signalled by the host's kernel ([`Outside`]), which knows no masks. So a masked
//! one is not connected to KVM: its signals stay in its event file descriptor, which is then the pending bit, and KVM takes
//! them when it is connected again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::SeqCst};

use nix::libc::EFD_CLOEXEC;
use parking_lot::Mutex;
use vgpu::function::InterruptSink;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::host::{Host, Message, PINS};
use super::msi::{MsiSetup, MsixTable};

/// Interrupt numbers in all, a quarter of what KVM has.
const NUMBERS: u32 = 1024;

/// KVM's table from interrupt numbers to pins and messages.
pub(super) struct Routes {
    host: Arc<dyn Host>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    used: BTreeSet<u32>,
    messages: BTreeMap<u32, Message>,
}

impl Routes {
    pub(super) fn new(host: Arc<dyn Host>) -> Arc<Self> {
        Arc::new(Self { host, table: Mutex::default() })
    }

    fn allocate(&self) -> io::Result<u32> {
        let mut table = self.table.lock();
        let number = (PINS..NUMBERS).find(|number| !table.used.contains(number));
        let number = number.ok_or_else(|| io::Error::other("no interrupt number is left"))?;
        table.used.insert(number);
        Ok(number)
    }

    fn free(&self, number: u32) {
        let mut table = self.table.lock();
        table.used.remove(&number);
        if table.messages.remove(&number).is_some() {
            // An old route of a number that nothing signals is harmless.
            let _ = self.host.route(&table.messages);
        }
    }

    fn set(&self, number: u32, message: Message) -> io::Result<()> {
        let mut table = self.table.lock();
        let old = table.messages.insert(number, message);
        if old == Some(message) {
            return Ok(());
        }
        self.host.route(&table.messages).inspect_err(|_| {
            // It would be refused with every other number's, and taken for routed when it is set again.
            match old {
                Some(old) => table.messages.insert(number, old),
                None => table.messages.remove(&number),
            };
        })
    }
}

/// Somebody else who signals vectors: the host's kernel, for a device that it hands over.
pub(super) trait Outside: Send + Sync {
    /// Lets the device's interrupts of this kind signal these vectors, or none any more. Called with a set-up's lock held.
    fn signal(&self, kind: &MsiSetup, vectors: &[&EventFd]);
}

/// One vector: signalled by whoever raises it, routed by KVM.
struct Vector {
    event: EventFd,
    number: u32,
    /// Signalled by [`Outside`], and connected to KVM only while it is not masked.
    outside: bool,
    /// Raised vectors stay pending while this is set.
    masked: AtomicBool,
    pending: AtomicBool,
}

impl Vector {
    fn raise(&self) {
        if self.masked.load(SeqCst) {
            self.pending.store(true, SeqCst);
            // Unmasked between the two: whoever takes the pending bit signals.
            if self.masked.load(SeqCst) || !self.pending.swap(false, SeqCst) {
                return;
            }
        }
        // The only failure is a counter at its end, and then KVM has yet to see the earlier signals.
        let _ = self.event.write(1);
    }

    fn unmask(&self, host: &dyn Host) {
        if self.outside {
            if self.masked.load(SeqCst) && host.connect(&self.event, self.number).is_ok() {
                self.masked.store(false, SeqCst);
            }
            return;
        }
        self.masked.store(false, SeqCst);
        if self.pending.swap(false, SeqCst) {
            let _ = self.event.write(1);
        }
    }

    fn mask(&self, host: &dyn Host) {
        if !self.masked.swap(true, SeqCst) && self.outside {
            host.disconnect(&self.event, self.number);
        }
    }

    fn is_pending(&self) -> bool {
        if !self.outside {
            return self.pending.load(SeqCst);
        }
        // Taken and put back: should it be connected in between, putting it back signals.
        let taken = self.masked.load(SeqCst).then(|| self.event.read());
        matches!(taken, Some(Ok(count)) if self.event.write(count).is_ok())
    }

    fn forget(&self) {
        self.pending.store(false, SeqCst);
        if self.outside {
            // Fails if there was nothing.
            let _ = self.event.read();
        }
    }
}

/// How the guest has set a function's interrupts up.
struct Setup {
    msi: MsiSetup,
    table: MsixTable,
}

/// The interrupts of one function.
pub(super) struct Messages {
    host: Arc<dyn Host>,
    routes: Arc<Routes>,
    vectors: Vec<Vector>,
    /// Held while vectors are set up, never while the function is called.
    setup: Mutex<Setup>,
    outside: Option<Arc<dyn Outside>>,
    /// How many vectors are in use: 0 off; a vector raised beyond them is sent as the remainder if `folds` (MSI).
    used: AtomicU16,
    folds: AtomicBool,
}

impl Messages {
    /// For a function that raises so many vectors, or for which `outside` does.
    pub(super) fn new(
        host: &Arc<dyn Host>,
        routes: &Arc<Routes>,
        vectors: u16,
        outside: Option<Arc<dyn Outside>>,
    ) -> io::Result<Arc<Self>> {
        let signalled = outside.is_some();
        let mut messages = Self {
            host: Arc::clone(host),
            routes: Arc::clone(routes),
            vectors: Vec::new(),
            setup: Mutex::new(Setup { msi: MsiSetup::default(), table: MsixTable::new(vectors) }),
            outside,
            used: AtomicU16::new(0),
            folds: AtomicBool::new(false),
        };
        for _ in 0..vectors {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            let number = routes.allocate()?;
            if !signalled {
                if let Err(error) = host.connect(&event, number) {
                    routes.free(number);
                    return Err(error);
                }
            }
            messages.vectors.push(Vector {
                event,
                number,
                outside: signalled,
                masked: AtomicBool::new(true),
                pending: AtomicBool::new(false),
            });
        }
        Ok(Arc::new(messages))
    }

    /// The guest has changed MSI, MSI-X or bus mastering in configuration space.
    pub(super) fn configure(&self, msi: MsiSetup) {
        let mut setup = self.setup.lock();
        if setup.msi != msi {
            setup.msi = msi;
            self.apply(&setup);
        }
    }

    /// The function was reset: its table is as at power-on.
    pub(super) fn reset_table(&self) {
        let mut setup = self.setup.lock();
        setup.table.reset();
        self.apply(&setup);
    }

    /// Reads the table or, with `pending`, the pending bits.
    pub(super) fn table_read(&self, pending: bool, offset: u64, data: &mut [u8]) {
        if pending {
            for (i, byte) in data.iter_mut().enumerate() {
                let first = usize::try_from(offset).ok().and_then(|at| at.checked_add(i)?.checked_mul(8));
                *byte = first.map_or(0, |first| self.pending_bits(first) as u8);
            }
        } else {
            self.setup.lock().table.read(offset, data);
        }
    }

    /// Writes the table.
    pub(super) fn table_write(&self, offset: u64, data: &[u8]) {
        let mut setup = self.setup.lock();
        if setup.table.write(offset, data) {
            self.apply(&setup);
        }
    }

    /// Pending bits of up to 32 vectors from `first` on.
    pub(super) fn pending_bits(&self, first: usize) -> u32 {
        let from = self.vectors.get(first..).unwrap_or_default().iter().take(32);
        from.enumerate().fold(0, |bits, (i, v)| bits | u32::from(v.is_pending()) << i)
    }

    /// Raises each vector whose bit is set.
    pub(super) fn raise_all(&self, bits: u32) {
        (0..32).filter(|vector| bits & 1 << vector != 0).for_each(|vector| self.raise(vector));
    }

    fn apply(&self, setup: &Setup) {
        let Setup { msi, table } = setup;
        let used = msi.vectors().min(self.vectors.len() as u16);
        if used == 0 {
            self.used.store(0, SeqCst);
            if let Some(outside) = &self.outside {
                outside.signal(&MsiSetup::Off, &[]);
            }
            for vector in &self.vectors {
                vector.mask(&*self.host);
                vector.forget();
            }
            return;
        }
        for (index, vector) in (0..used).zip(&self.vectors) {
            match msi.message(index, table) {
                // A message that KVM does not take is one that no processor would have got.
                Some(message) if self.routes.set(vector.number, message).is_ok() => {
                    vector.unmask(&*self.host);
                }
                _ => vector.mask(&*self.host),
            }
        }
        self.folds.store(msi.folds(), SeqCst);
        self.used.store(used, SeqCst);
        if let Some(outside) = &self.outside {
            let events: Vec<_> = self.vectors.iter().take(used.into()).map(|vector| &vector.event).collect();
            outside.signal(msi, &events);
        }
    }
}

impl InterruptSink for Messages {
    fn raise(&self, vector: u16) {
        let used = self.used.load(SeqCst);
        let folded = if self.folds.load(SeqCst) { vector.checked_rem(used) } else { Some(vector) };
        let Some(index) = folded.filter(|index| *index < used) else { return };
        if let Some(vector) = self.vectors.get(usize::from(index)) {
            vector.raise();
        }
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        for vector in &self.vectors {
            if !vector.outside || !vector.masked.load(SeqCst) {
                self.host.disconnect(&vector.event, vector.number);
            }
            self.routes.free(vector.number);
        }
    }
}
