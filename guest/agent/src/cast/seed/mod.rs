// SPDX-License-Identifier: MIT OR Apache-2.0
//! The casts of the seed's scenarios (docs/seed.md): processes whose address space is mirrored, and who takes it apart.
//!
//! A process that is to end and be released binds files that its parent has opened, so that the parent can unregister them
//! meanwhile, from an address space of its own.

mod deadlock;
mod reclaim;
mod release;

pub(super) use deadlock::{mirrors_sem, mirrors_sem_narrow};
pub(super) use reclaim::{range_held, range_unheld, reclaim};
pub(super) use release::{release_once, release_unregister, release_waits, unregister_in_release};

use nix::errno::Errno;
use vgpu_spec::uapi::{Act, Layer};

use super::Stage;
use crate::client::Context;
use crate::device::DeviceFile;
use crate::memory::{Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure};
use crate::process::Child;

/// Has the driver do something; on a driver that cannot the scenario cannot be tried.
fn act(file: &dyn DeviceFile, act: Act) -> Checked {
    match file.act(&act) {
        Err(Errno::ENOTTY) => Err(Failure::Skip("the driver's backend is not `mirror`".to_owned())),
        other => other.doing("act"),
    }
}

/// What the layer has counted. See [`act`].
fn layer(file: &dyn DeviceFile) -> Checked<Layer> {
    match file.layer() {
        Ok(layer) if layer.policy != vgpu_spec::uapi::policy::NONE => Ok(layer),
        Ok(_) | Err(Errno::ENOTTY) => Err(Failure::Skip("the driver's backend is not `mirror`".to_owned())),
        Err(errno) => Err(errno).doing("layer"),
    }
}

/// Files that this process has opened, for another to bind.
fn open(stage: &Stage<'_>, count: usize) -> Checked<Vec<Box<dyn DeviceFile>>> {
    (0..count).map(|_| stage.device.open().doing("open")).collect()
}

/// Contexts on the calling process, bound in the order of the files.
fn bind(stage: &Stage<'_>, files: &[Box<dyn DeviceFile>]) -> Checked<Vec<Context>> {
    files.iter().map(|file| Context::bind_on(stage.device, file.duplicate().doing("dup")?)).collect()
}

/// The same; each has read a page of it.
fn mirror(stage: &Stage<'_>, files: &[Box<dyn DeviceFile>]) -> Checked<(Vec<Context>, Mapping)> {
    let mut rng = stage.rng();
    let map = Mapping::small(PAGE).doing("mmap")?;
    let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
    map.fill(0, PAGE, pattern);
    let contexts = bind(stage, files)?;
    contexts.iter().try_for_each(|context| context.check(&map, 0, PAGE, pattern))?;
    Ok((contexts, map))
}

/// A process that mirrors itself through `files`, has `prepare` done, and ends when the scenario opens the gate `exit`.
fn mirrored_process(
    stage: &Stage<'_>,
    files: &[Box<dyn DeviceFile>],
    prepare: impl FnOnce(&[Context]) -> Checked,
) -> Checked<Child> {
    let mut child = Child::spawn(|parent| {
        let (contexts, map) = mirror(stage, files)?;
        prepare(&contexts)?;
        parent.ready(0);
        stage.gates.point("exit")?;
        // Neither the mapping nor the descriptors go before the address space does.
        std::mem::forget((contexts, map));
        Ok(())
    })?;
    child.wait_ready()?;
    Ok(child)
}
