// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver's and the witness's device nodes.
#![allow(unsafe_code)] // ioctls, and descriptors that one thread closes while another uses them: that race is a workload

use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use vgpu_spec::uapi::{
    Act, Associate, Bind, DRIVER_DEVICE, DRIVER_MAGIC, Layer, Migrate, NR_UNBIND, Query, Stable, Submit,
    WITNESS_DEVICE, WITNESS_MAGIC, Wait,
};

use super::{Device, DeviceFile};

nix::ioctl_readwrite!(ioctl_bind, DRIVER_MAGIC, 1, Bind);
nix::ioctl_readwrite!(ioctl_submit, DRIVER_MAGIC, 2, Submit);
nix::ioctl_readwrite!(ioctl_wait, DRIVER_MAGIC, 3, Wait);
nix::ioctl_read!(ioctl_query, DRIVER_MAGIC, 4, Query);
nix::ioctl_readwrite!(ioctl_to_device, DRIVER_MAGIC, 6, Migrate);
nix::ioctl_readwrite!(ioctl_to_system, DRIVER_MAGIC, 7, Migrate);
nix::ioctl_none!(ioctl_unbind, DRIVER_MAGIC, NR_UNBIND);
nix::ioctl_read!(ioctl_layer, DRIVER_MAGIC, 32, Layer);
nix::ioctl_write_ptr!(ioctl_act, DRIVER_MAGIC, 33, Act);
nix::ioctl_write_ptr!(ioctl_associate, WITNESS_MAGIC, 1, Associate);
nix::ioctl_write_ptr!(ioctl_stable_begin, WITNESS_MAGIC, 16, Stable);
nix::ioctl_write_ptr!(ioctl_stable_end, WITNESS_MAGIC, 17, Stable);

/// Opens a device node.
fn open_node(path: &str) -> Result<OwnedFd, Errno> {
    open(path, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
}

/// The device nodes of this guest.
#[derive(Debug, Default)]
pub(crate) struct Nodes;

impl Device for Nodes {
    fn open(&self) -> Result<Box<dyn DeviceFile>, Errno> {
        Ok(Box::new(NodeFile(AtomicI32::new(open_node(DRIVER_DEVICE)?.into_raw_fd()))))
    }

    fn associate(&self, context: u64) -> Result<(), Errno> {
        use std::os::fd::AsRawFd;
        let witness = match open_node(WITNESS_DEVICE) {
            // A guest without a witness: nobody to tell.
            Err(Errno::ENOENT) => return Ok(()),
            other => other?,
        };
        // SAFETY: the structure is the one that the ioctl's number names, and lives through the call.
        unsafe { ioctl_associate(witness.as_raw_fd(), &Associate { ctx: context }) }.map(drop)
    }

    fn declare(&self, range: &Stable, on: bool) -> Result<(), Errno> {
        use std::os::fd::AsRawFd;
        let witness = match open_node(WITNESS_DEVICE) {
            Err(Errno::ENOENT) => return Ok(()),
            other => other?,
        };
        let call = if on { ioctl_stable_begin } else { ioctl_stable_end };
        // SAFETY: as for `associate`.
        unsafe { call(witness.as_raw_fd(), range) }.map(drop)
    }
}

/// A descriptor that any thread may close under another's hands, which is what some cases are about. -1 when closed.
#[derive(Debug)]
struct NodeFile(AtomicI32);

impl NodeFile {
    fn raw(&self) -> Result<RawFd, Errno> {
        match self.0.load(Ordering::Acquire) {
            -1 => Err(Errno::EBADF),
            fd => Ok(fd),
        }
    }
}

// SAFETY, for every ioctl below: the argument is the structure that the ioctl's number names and lives through the call. The
// descriptor may be closed by another thread meanwhile: the kernel holds the file during the call, and answers EBADF before.
// No workload opens other files while it does this, so that the number is not another file's.
impl DeviceFile for NodeFile {
    fn bind(&self) -> Result<u64, Errno> {
        let mut bind = Bind::default();
        // SAFETY: see above.
        unsafe { ioctl_bind(self.raw()?, &mut bind) }?;
        Ok(bind.ctx)
    }

    fn submit(&self, job: &Submit) -> Result<u64, Errno> {
        let mut job = *job;
        // SAFETY: see above.
        unsafe { ioctl_submit(self.raw()?, &mut job) }?;
        Ok(job.fence)
    }

    fn wait(&self, queue: u32, fence: u64, timeout: Duration) -> Result<Wait, Errno> {
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let mut wait = Wait { queue, fence, timeout_ns, ..Wait::default() };
        // SAFETY: see above.
        unsafe { ioctl_wait(self.raw()?, &mut wait) }?;
        Ok(wait)
    }

    fn migrate(&self, addr: u64, len: u64, to_device: bool) -> Result<u64, Errno> {
        let mut migrate = Migrate { addr, len, ..Migrate::default() };
        let fd = self.raw()?;
        // SAFETY: see above.
        unsafe {
            if to_device { ioctl_to_device(fd, &mut migrate) } else { ioctl_to_system(fd, &mut migrate) }
        }?;
        Ok(migrate.migrated)
    }

    fn query(&self) -> Result<Query, Errno> {
        let mut query = Query::default();
        // SAFETY: see above.
        unsafe { ioctl_query(self.raw()?, &mut query) }?;
        Ok(query)
    }

    fn unbind(&self) -> Result<(), Errno> {
        // SAFETY: see above; no argument.
        unsafe { ioctl_unbind(self.raw()?) }.map(drop)
    }

    fn layer(&self) -> Result<Layer, Errno> {
        let mut layer = Layer::default();
        // SAFETY: see above.
        unsafe { ioctl_layer(self.raw()?, &mut layer) }?;
        Ok(layer)
    }

    fn act(&self, act: &Act) -> Result<(), Errno> {
        // SAFETY: see above.
        unsafe { ioctl_act(self.raw()?, act) }.map(drop)
    }

    fn duplicate(&self) -> Result<Box<dyn DeviceFile>, Errno> {
        // SAFETY: open for the moment of the call, or EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(self.raw()?) };
        let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(3))?;
        Ok(Box::new(Self(AtomicI32::new(copy))))
    }

    fn keep_across_exec(&self, keep: bool) -> Result<(), Errno> {
        // SAFETY: as for `duplicate`.
        let fd = unsafe { BorrowedFd::borrow_raw(self.raw()?) };
        let flags = if keep { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
        fcntl(fd, FcntlArg::F_SETFD(flags)).map(drop)
    }

    fn close(&self) {
        let fd = self.0.swap(-1, Ordering::AcqRel);
        if fd != -1 {
            // SAFETY: taken out of the cell, so this is the only owner now.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

impl Drop for NodeFile {
    fn drop(&mut self) {
        self.close();
    }
}
