// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process ends, and its mirrors are told; meanwhile others unregister them.

use std::os::fd::AsRawFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vgpu_spec::uapi::{Act, Layer, act as op, policy};

use super::super::{Stage, fault::join};
use super::{act, layer, mirrored_process, open};
use crate::client::Context;
use crate::device::DeviceFile;
use crate::memory::{Backing, Mapping, PAGE};
use crate::outcome::{Checked, Doing, require};

/// Mirrors of the process that has many.
const MANY: usize = 12;

fn unbind(file: &dyn DeviceFile) -> Checked {
    file.unbind().doing("unbind")
}

/// `release-unregister`: a process ends while U unregisters its only mirror. U comes to `user:unregister` and `user:unregistered`.
pub(crate) fn release_unregister(stage: &Stage<'_>) -> Checked {
    let files = open(stage, 1)?;
    layer(&*files[0])?;
    let mut child = mirrored_process(stage, &files, |_| Ok(()))?;
    std::thread::scope(|scope| {
        let unregister = scope.spawn(|| {
            stage.gates.role("U")?;
            stage.gates.point("unregister")?;
            unbind(&*files[0])?;
            stage.gates.point("unregistered")?;
            stage.gates.role("")
        });
        let ended = child.join();
        join(unregister)?;
        ended
    })
}

/// `release-once`: a process with many mirrors ends while U unregisters all but the one that its release comes to first.
pub(crate) fn release_once(stage: &Stage<'_>) -> Checked {
    let files = open(stage, MANY)?;
    let before = layer(&*files[0])?;
    let mut child = mirrored_process(stage, &files, |_| Ok(()))?;
    // The list has the newest first.
    let (last, others) = files.split_last().map_or((None, &files[..]), |(last, rest)| (Some(last), rest));
    std::thread::scope(|scope| {
        let unregister = scope.spawn(|| {
            stage.gates.role("U")?;
            stage.gates.point("unregister")?;
            others.iter().try_for_each(|file| unbind(&**file))?;
            stage.gates.point("unregistered")?;
            stage.gates.role("")
        });
        let ended = child.join();
        join(unregister)?;
        ended
    })?;
    if let Some(last) = last {
        unbind(&**last)?;
    }
    told_once(&before, &layer(&*files[0])?)
}

/// Every mirror was told of the end at most once, and every one is gone.
fn told_once(before: &Layer, after: &Layer) -> Checked {
    let (registered, unregistered, releases, again) = (
        after.registered - before.registered,
        after.unregistered - before.unregistered,
        after.releases - before.releases,
        after.releases_again - before.releases_again,
    );
    let told = || {
        format!(
            "{registered} mirrors were registered, {unregistered} unregistered, release was called {releases} times, {again} times for one that knew"
        )
    };
    require(registered == MANY as u64 && unregistered == registered, told)?;
    require(again == 0 && (1..=registered).contains(&releases), told)
}

/// `release-waits`: the release callback of a process's mirror waits for work that invalidates that process; B unregisters its other mirror.
/// B comes to `user:unregister` and `user:unregistered`, the process's parent to `user:ended` when it has ended.
pub(crate) fn release_waits(stage: &Stage<'_>) -> Checked {
    let files = open(stage, 2)?;
    layer(&*files[0])?;
    let mut child = mirrored_process(stage, &files, |contexts| waits(&contexts[1]))?;
    std::thread::scope(|scope| {
        let unregister = scope.spawn(|| {
            stage.gates.role("B")?;
            stage.gates.point("unregister")?;
            unbind(&*files[0])?;
            stage.gates.point("unregistered")?;
            stage.gates.role("")
        });
        stage.gates.role("P")?;
        let ended = child.join();
        stage.gates.point("ended")?;
        stage.gates.role("")?;
        join(unregister)?;
        ended
    })
}

/// The context's release is to wait for work that unmaps a file which the calling process has mapped for good.
fn waits(context: &Context) -> Checked {
    let file = memfd_create(c"seed", MFdFlags::MFD_CLOEXEC).doing("memfd_create")?;
    ftruncate(&file, PAGE as i64).doing("ftruncate")?;
    let map =
        Mapping::new(PAGE, PAGE, Backing::FileShared(std::os::fd::AsFd::as_fd(&file), 0)).doing("mmap")?;
    map.store(0, 1);
    act(context.file(), Act { op: op::RELEASE_WAITS, fd: file.as_raw_fd(), addr: 0 })?;
    std::mem::forget(map);
    Ok(())
}

/// `unregister-in-release`: a mirror's release callback unregisters it.
pub(crate) fn unregister_in_release(stage: &Stage<'_>) -> Checked {
    let files = open(stage, 1)?;
    let before = layer(&*files[0])?;
    let mut child = mirrored_process(stage, &files, |contexts| {
        act(contexts[0].file(), Act { op: op::RELEASE_UNREGISTERS, ..Act::default() })
    })?;
    child.join()?;
    let after = layer(&*files[0])?;
    require(after.unregistered == before.unregistered + 1 && after.policy != policy::NONE, || {
        format!("{} mirrors were unregistered instead of 1", after.unregistered - before.unregistered)
    })
}
