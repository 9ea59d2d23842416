// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device as the workloads see it: files of the driver, behind a trait, so that the same workloads run in tests against a
//! model of the device in software.

#[cfg(test)]
pub(crate) mod model;
pub(crate) mod real;

use std::time::Duration;

use nix::errno::Errno;
use vgpu_spec::uapi::{Act, Layer, Query, Submit, Wait};

use crate::memory::Mapping;
use crate::outcome::{Checked, Doing};

/// Something that gives files of the driver.
pub(crate) trait Device: Sync {
    /// Opens the driver's device node.
    fn open(&self) -> Result<Box<dyn DeviceFile>, Errno>;
    /// Tells the witness that the caller's address space is mirrored by `context`.
    fn associate(&self, context: u64) -> Result<(), Errno>;
    /// Tells the witness that a range of the caller's address space is stable from now on, or is no longer (`on` false).
    fn declare(&self, range: &vgpu_spec::uapi::Stable, on: bool) -> Result<(), Errno>;
}

/// A promise: until this goes, the range stays mapped and can be read and written, so that no fault of the device in it may be
/// fatal (`fault/spurious-fatal`).
///
/// Only [`Stable::end`] makes what was found count: by then it is certain that the process was not dying meanwhile. Dropped
/// without, as when a case has failed, it takes the promise back.
pub(crate) struct Stable<'m> {
    device: &'m dyn Device,
    range: vgpu_spec::uapi::Stable,
    kept: bool,
    /// The mapping must not go first.
    _map: &'m Mapping,
}

impl<'m> Stable<'m> {
    /// Gives it for a part of a mapping.
    pub(crate) fn declare(
        device: &'m dyn Device,
        map: &'m Mapping,
        offset: usize,
        bytes: usize,
    ) -> Checked<Self> {
        let range = vgpu_spec::uapi::Stable {
            start: map.at(offset),
            last: map.at(offset) + bytes as u64 - 1,
            kept: 0,
        };
        device.declare(&range, true).doing("declare a stable range")?;
        Ok(Self { device, range, kept: false, _map: map })
    }

    /// Ends it, kept.
    pub(crate) fn end(mut self) -> Checked {
        self.kept = true;
        self.tell().doing("end a stable range")
    }

    fn tell(&self) -> Result<(), Errno> {
        self.device.declare(&vgpu_spec::uapi::Stable { kept: self.kept.into(), ..self.range }, false)
    }
}

impl Drop for Stable<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = self.tell();
        }
    }
}

/// An open file of the driver. See [`vgpu_spec::uapi`] for what each call does and its errors.
pub(crate) trait DeviceFile: Send + Sync {
    /// BIND: the context's handle.
    fn bind(&self) -> Result<u64, Errno>;
    /// SUBMIT: the fence.
    fn submit(&self, job: &Submit) -> Result<u64, Errno>;
    /// WAIT.
    fn wait(&self, queue: u32, fence: u64, timeout: Duration) -> Result<Wait, Errno>;
    /// MIGRATE_TO_DEVICE or MIGRATE_TO_SYSTEM: how many pages have gone.
    fn migrate(&self, address: u64, bytes: u64, to_device: bool) -> Result<u64, Errno>;
    /// QUERY.
    fn query(&self) -> Result<Query, Errno>;
    /// UNBIND.
    fn unbind(&self) -> Result<(), Errno>;
    /// LAYER.
    fn layer(&self) -> Result<Layer, Errno>;
    /// ACT.
    fn act(&self, act: &Act) -> Result<(), Errno>;
    /// Another descriptor of the same open file.
    fn duplicate(&self) -> Result<Box<dyn DeviceFile>, Errno>;
    /// Whether the descriptor outlives an exec.
    fn keep_across_exec(&self, keep: bool) -> Result<(), Errno>;
    /// Closes this descriptor; later calls on it are EBADF. Dropping does the same.
    fn close(&self);
}
