// SPDX-License-Identifier: MIT OR Apache-2.0
//! The IOMMU's tables for devices that are handed over: opened in one of two ways, and filled with the guest's memory.
//!
//! Both ways count the memory as locked: a container against the limit of the process, iommufd against that of the user.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use iommufd_ioctls::{IommuFd, IommufdError};
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioError, VfioIommufd, VfioOps};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::kvm_failure;
use super::memory::GuestRam;
use super::vfio_host::{Bdf, Way};
use crate::failure::{Failure, Result};

/// Tables that all devices of a machine share. They are gone with it and the last of its devices.
pub(super) struct Iommu(Arc<dyn VfioOps>);

impl Iommu {
    /// Opens them, empty.
    pub(super) fn new(way: Way, vm: &VmFd) -> Result<Self> {
        let mut kind = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
        // KVM has to know of the devices: some make it honour what the guest says about caches.
        let known = vm.create_device(&mut kind).map_err(kvm_failure("work with VFIO"))?;
        let known = Some(Arc::new(VfioDeviceFd::new_from_kvm(known)));
        let fail = |error: &dyn Error| Failure::environment(format!("--vfio: {}", whole(error)));
        Ok(Self(match way {
            Way::Groups => Arc::new(VfioContainer::new(known).map_err(|error| fail(&error))?),
            Way::Iommufd => {
                let iommufd = Arc::new(IommuFd::new().map_err(|error| fail(&error))?);
                Arc::new(VfioIommufd::new(iommufd, None, known).map_err(|error| fail(&error))?)
            }
        }))
    }

    /// Takes a device, whose folder in `/sys` that is: its DMA goes through these tables from here on.
    pub(super) fn take(&self, bdf: Bdf, path: &Path) -> Result<VfioDevice> {
        VfioDevice::new(path, Arc::clone(&self.0), true).map_err(|error| refused(bdf, &error))
    }

    /// Maps the guest's memory, at the guest's addresses. Whoever may write it must be kept from outliving `ram`.
    pub(super) fn map(&self, ram: &Arc<GuestRam>) -> Result<()> {
        for region in ram.map.iter() {
            let (at, bytes) = (region.start_addr().raw_value(), region.len() as usize);
            #[allow(unsafe_code)] // a device writes that memory
            // SAFETY: the RAM is a shared mapping of its file, which is only ever read and written through volatile accesses and by
            // the guest; the devices keep it (`vfio::Device::_ram`), and the kernel keeps its pages until the IOMMU knows them no
            // more.
            let mapped = unsafe { self.0.vfio_dma_map(at, bytes, region.as_ptr()) };
            mapped.map_err(|error| unmapped(&error))?;
        }
        Ok(())
    }
}

/// An error with what is behind it: some of the crate's do not tell.
fn whole(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut behind = error.source();
    while let Some(error) = behind {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        behind = error.source();
    }
    text
}

fn refused(bdf: Bdf, error: &VfioError) -> Failure {
    let failure =
        Failure::environment(format!("--vfio {bdf}: the host does not hand it over: {}", whole(error)));
    match error {
        VfioError::ContainerSetIOMMU(errno) if errno.errno() == libc::EPERM => failure.remedy(
            "the IOMMU does not remap interrupts: turn that on (on a virtual one, intremap=on); or trust the guest with \
             all interrupts of the host: vfio_iommu_type1.allow_unsafe_interrupts=1",
        ),
        // drivers/iommu/iommufd/device.c has it for both.
        VfioError::VfioDeviceBindIommufd(errno) if errno.errno() == libc::EPERM => failure.remedy(
            "either another program has a device of its IOMMU group: end that; or the IOMMU does not remap interrupts: turn \
             that on (on a virtual one, intremap=on), or trust the guest with all interrupts of the host: \
             iommufd.allow_unsafe_interrupts=1",
        ),
        VfioError::GroupViable => failure.remedy("bind all devices of its IOMMU group to vfio-pci"),
        VfioError::OpenGroup(..) => failure.remedy("end the program that uses the group"),
        VfioError::VfioDeviceBindIommufd(errno) if matches!(errno.errno(), libc::EBUSY | libc::EINVAL) => {
            failure.remedy("end the program that uses the device")
        }
        _ => failure,
    }
}

fn unmapped(error: &VfioError) -> Failure {
    let failure = Failure::environment(format!(
        "--vfio: the guest's memory cannot be given to the device: {}",
        whole(error)
    ));
    match errno(error) {
        Some(libc::ENOMEM) => {
            let limit = getrlimit(Resource::RLIMIT_MEMLOCK)
                .map_or_else(|_| String::new(), |(limit, _)| format!(" (the limit is {} MiB)", limit >> 20));
            failure.remedy(format!(
                "all of it is locked in memory{limit}: raise the limit with `ulimit -l` or in \
                 /etc/security/limits.conf, or give the guest less with --memory"
            ))
        }
        Some(libc::EINVAL | libc::EADDRINUSE) => failure.remedy(
            "the IOMMU keeps a part of these addresses for itself: give the guest less with --memory",
        ),
        _ => failure,
    }
}

/// What the kernel said, if it was asked to map memory.
fn errno(error: &VfioError) -> Option<i32> {
    match error {
        VfioError::IommuDmaMap(errno) => Some(errno.errno()),
        VfioError::IommufdIoctlError(IommufdError::IommuIoasMap(error)) => Some(error.errno()),
        _ => None,
    }
}
