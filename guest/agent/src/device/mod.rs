// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device as the workloads see it: files of the driver, behind a trait, so that the same workloads run in tests against a
//! model of the device in software.

#[cfg(test)]
pub(crate) mod model;
pub(crate) mod real;

use std::time::Duration;

use nix::errno::Errno;
use vgpu_spec::uapi::{Act, Layer, Query, Submit, Wait};

/// Something that gives files of the driver.
pub(crate) trait Device: Sync {
    /// Opens the driver's device node.
    fn open(&self) -> Result<Box<dyn DeviceFile>, Errno>;
    /// Tells the witness that the caller's address space is mirrored by `context`.
    fn associate(&self, context: u64) -> Result<(), Errno>;
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
