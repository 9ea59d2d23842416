// SPDX-License-Identifier: MIT OR Apache-2.0
//! PCI devices of the host that are handed over to the guest (VFIO).
//!
//! | what | how |
//! |---|---|
//! | DMA | all of the RAM is mapped in the IOMMU where the guest has it, and nothing else: the rest is refused by the IOMMU: [`vfio_iommu`](super::vfio_iommu) |
//! | BARs | what the kernel lets be mapped is memory of the guest's; the pages of the MSI-X table and the rest are trapped |
//! | configuration space | [`vfio_config`](super::vfio_config) |
//! | MSI, MSI-X | the kernel signals the vectors' event file descriptors, which KVM routes: [`irq`](super::irq) |
//! | interrupt lines, I/O ports, expansion ROMs | not handed over |
//!
//! The device is reset before the guest has it and after. Locks: [`Device::config`] as a function's own, [`Signals::now`] as a
//! leaf.

use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::libc;
use parking_lot::Mutex;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vgpu::function::{Backing, Bar, Effects, Function};
use vm_memory::{MmapRegion, mmap::MmapRegionBuilder};
use vmm_sys_util::eventfd::EventFd;

use super::irq::Outside;
use super::layout::PAGE;
use super::memory::GuestRam;
use super::msi::{Capabilities, MsiSetup, Place};
use super::pci::Passed;
use super::vfio_config::{BarShape, Config, Raw};
use super::vfio_host::{Bdf, Handover};
use super::vfio_iommu::Iommu;
use crate::failure::{Failure, Result};

/// BARs of a function.
const BARS: usize = 6;

/// Takes the devices, and gives them the guest's memory. `trouble` ends the machine.
///
/// # Errors
/// If the host does not hand one of them over; the failure says what to do about it.
pub(super) fn open(
    found: &Handover,
    vm: &VmFd,
    ram: &Arc<GuestRam>,
    trouble: &Arc<dyn Fn(String) + Send + Sync>,
) -> Result<Vec<Passed>> {
    let iommu = Iommu::new(found.way, vm)?;
    let mut opened = Vec::new();
    for (bdf, path) in &found.devices {
        let device = iommu.take(*bdf, path)?;
        device.reset();
        opened.push((*bdf, Arc::new(device)));
    }
    // The first device has made the IOMMU's tables; they serve all.
    iommu.map(ram)?;
    opened.into_iter().map(|(bdf, device)| passed(bdf, device, ram, trouble)).collect()
}

fn passed(
    bdf: Bdf,
    device: Arc<VfioDevice>,
    ram: &Arc<GuestRam>,
    trouble: &Arc<dyn Fn(String) + Send + Sync>,
) -> Result<Passed> {
    let fail = |what: String| Failure::environment(format!("--vfio {bdf}: {what}"));
    let mut sizes = [0; BARS];
    for (index, size) in (VFIO_PCI_BAR0_REGION_INDEX..).zip(&mut sizes) {
        *size = device.get_region_size(index);
    }
    let region = Region(Arc::clone(&device));
    let (config, shapes) = Config::new(&region, sizes);
    config.set_command(&region);
    let capabilities = Capabilities::find(&|at| {
        let mut bytes = [0xff; 4];
        config.read(&region, at, &mut bytes);
        u32::from_le_bytes(bytes)
    });
    let table: Vec<Place> = capabilities.msix.map(|msix| vec![msix.table, msix.pending]).unwrap_or_default();
    let mut areas = Vec::new();
    for shape in &shapes {
        for area in mappable(&device, shape) {
            for part in without(area, shape.index, &table) {
                let offset = device.get_region_offset(shape.index.into()) + part.start;
                let map = map(&device, offset, part.end - part.start)
                    .map_err(|error| fail(format!("BAR {} cannot be mapped: {error}", shape.index)))?;
                areas.push((shape.index, part.start, map));
            }
        }
    }
    let count = |index| device.get_irq_info(index).map_or(0, |irq| irq.count);
    let vectors = count(VFIO_PCI_MSI_IRQ_INDEX).max(count(VFIO_PCI_MSIX_IRQ_INDEX));
    let vectors = u16::try_from(vectors).map_err(|_| fail(format!("it has {vectors} vectors")))?;
    let outside =
        Signals { device: Arc::clone(&device), now: Mutex::new(None), trouble: Arc::clone(trouble), bdf };
    let function = Device {
        region,
        config: Mutex::new(config),
        shapes,
        vectors,
        msix: capabilities.msix.is_some(),
        _ram: Arc::clone(ram),
    };
    Ok(Passed { name: bdf.to_string(), function: Arc::new(function), areas, outside: Arc::new(outside) })
}

/// The parts of a BAR that the kernel lets be mapped: whole pages.
fn mappable(device: &VfioDevice, shape: &BarShape) -> Vec<Range<u64>> {
    let index = shape.index.into();
    if device.get_region_flags(index) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Vec::new();
    }
    let mut parts = Vec::new();
    let mut sparse = false;
    for cap in device.get_region_caps(index) {
        if let VfioRegionInfoCap::SparseMmap(areas) = cap {
            sparse = true;
            parts.extend(areas.areas.iter().map(|area| area.offset..area.offset.saturating_add(area.size)));
        }
    }
    if !sparse {
        parts.push(0..shape.size);
    }
    let whole = |part: &Range<u64>| part.start % PAGE == 0 && part.end % PAGE == 0 && part.end <= shape.size;
    parts.retain(|part| part.start < part.end && whole(part));
    parts
}

/// What is left of a part of a BAR without the pages of the MSI-X table and its pending bits.
fn without(part: Range<u64>, bar: u8, tables: &[Place]) -> Vec<Range<u64>> {
    let mut left = vec![part];
    for table in tables.iter().filter(|table| table.bar == bar) {
        let start = table.offset & !(PAGE - 1);
        let end = table.offset.saturating_add(table.bytes).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        left = left
            .into_iter()
            .flat_map(|part| [part.start..part.end.min(start), part.start.max(end)..part.end])
            .filter(|part| part.start < part.end)
            .collect();
    }
    left
}

fn map(device: &Arc<VfioDevice>, offset: u64, bytes: u64) -> std::result::Result<MmapRegion<()>, String> {
    use std::os::fd::AsRawFd;
    let length = usize::try_from(bytes).map_err(|error| error.to_string())?;
    #[allow(unsafe_code)] // to open the device once more
    // SAFETY: the descriptor is open as long as the device is; the copy is owned by the file alone.
    let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(device.as_raw_fd()) }
        .try_clone_to_owned()
        .map_err(|error| error.to_string())?;
    MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(vm_memory::FileOffset::new(file.into(), offset))
        .build()
        .map_err(|error| error.to_string())
}

/// The device's own configuration space.
struct Region(Arc<VfioDevice>);

impl Raw for Region {
    fn read(&self, offset: u16, data: &mut [u8]) {
        self.0.region_read(VFIO_PCI_CONFIG_REGION_INDEX, data, offset.into());
    }
    fn write(&self, offset: u16, data: &[u8]) {
        self.0.region_write(VFIO_PCI_CONFIG_REGION_INDEX, data, offset.into());
    }
}

/// A device of the host.
struct Device {
    region: Region,
    config: Mutex<Config>,
    shapes: Vec<BarShape>,
    vectors: u16,
    msix: bool,
    /// What its DMA reaches: kept until the device is closed.
    _ram: Arc<GuestRam>,
}

impl Device {
    /// Whether all of an access is inside of a BAR.
    fn inside(&self, bar: u8, offset: u64, length: usize) -> bool {
        let shape = self.shapes.iter().find(|shape| shape.index == bar);
        shape.is_some_and(|shape| offset.checked_add(length as u64).is_some_and(|end| end <= shape.size))
    }
}

impl Function for Device {
    fn bars(&self) -> Vec<Bar<'_>> {
        let bar = |shape: &BarShape| Bar {
            index: shape.index,
            size: shape.size,
            prefetchable: shape.prefetchable,
            backing: Backing::Trapped,
        };
        self.shapes.iter().map(bar).collect()
    }
    fn vectors(&self) -> u16 {
        self.vectors
    }
    fn has_msix(&self) -> bool {
        self.msix
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().read(&self.region, offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> Effects {
        if self.config.lock().write(&self.region, offset, data) {
            return self.reset();
        }
        Effects::default()
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if self.inside(bar, offset, data.len()) {
            self.region.0.region_read(bar.into(), data, offset);
        }
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effects {
        if self.inside(bar, offset, data.len()) {
            self.region.0.region_write(bar.into(), data, offset);
        }
        Effects::default()
    }
    fn reset(&self) -> Effects {
        let mut config = self.config.lock();
        self.region.0.reset();
        config.reset(&self.region);
        Effects::default()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // No more DMA from here on, whether it can be reset or not.
        self.config.get_mut().reset(&self.region);
        self.region.0.reset();
    }
}

/// The device's interrupts in the host's kernel.
struct Signals {
    device: Arc<VfioDevice>,
    /// The kind that is on, and its number of vectors.
    now: Mutex<Option<(u32, usize)>>,
    trouble: Arc<dyn Fn(String) + Send + Sync>,
    bdf: Bdf,
}

impl Outside for Signals {
    fn signal(&self, kind: &MsiSetup, vectors: &[&EventFd]) {
        let index = match kind {
            MsiSetup::Off => None,
            MsiSetup::Msi { .. } => Some(VFIO_PCI_MSI_IRQ_INDEX),
            MsiSetup::Msix { .. } => Some(VFIO_PCI_MSIX_IRQ_INDEX),
        };
        // A guest may turn the smaller kind on; then the rest of the vectors has no interrupt.
        let most = |index| self.device.get_irq_info(index).map_or(0, |irq| irq.count as usize);
        let wanted =
            index.map(|index| (index, vectors.len().min(most(index)))).filter(|(_, count)| *count > 0);
        let mut now = self.now.lock();
        if *now == wanted {
            return;
        }
        let mut done = Ok(());
        if let Some((old, _)) = now.take() {
            done = self.device.disable_irq(old);
        }
        if let (Ok(()), Some((index, count))) = (&done, wanted) {
            done = self.device.enable_irq(index, vectors.iter().take(count).copied().collect());
            if done.is_ok() {
                *now = wanted;
            }
        }
        if let Err(error) = done {
            let errno = Errno::last();
            (self.trouble)(format!(
                "the host does not set the interrupts of {} up: {error} ({errno})",
                self.bdf
            ));
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        if let Some((index, _)) = self.now.get_mut().take() {
            // Closing the device does the same.
            let _ = self.device.disable_irq(index);
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // parts of one range are meant
mod tests {
    use super::*;

    #[test]
    fn the_tables_pages_are_not_mapped() {
        let place = |bar, offset, bytes| Place { bar, offset, bytes };
        let tables = [place(2, 0x2800, 48), place(2, 0x3000, 8)];
        assert_eq!(without(0..0x10000, 2, &tables), [0..0x2000, 0x4000..0x10000]);
        assert_eq!(without(0..0x10000, 0, &tables), [0..0x10000]);
        assert_eq!(without(0..0x1000, 1, &[place(1, 0, 16)]), []);
        assert_eq!(without(0x1000..0x3000, 1, &[place(1, u64::MAX - 7, 8)]), [0x1000..0x3000]);
    }
}
