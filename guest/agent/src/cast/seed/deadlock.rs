// SPDX-License-Identifier: MIT OR Apache-2.0
//! The three threads of the thread: an invalidation, an unregister, a migration.

use std::sync::Barrier;

use nix::sys::mman::MmapAdvise;
use vgpu_spec::uapi::{Act, act as op};

use super::super::{Stage, fault::join};
use super::{act, layer, mirror, open};
use crate::memory::{Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing};

/// `mirrors-sem`: A drops a page, C migrates another with the device lock held across it, B unregisters another mirror. Each
/// comes to a gate of its own, `user:a`, `user:b`, `user:c`, and to `user:a-done`, …
pub(crate) fn mirrors_sem(stage: &Stage<'_>) -> Checked {
    three(stage, op::MIGRATE_WIDE)
}

/// `mirrors-sem-narrow`: the same, C holding the device lock only to change what the device has.
pub(crate) fn mirrors_sem_narrow(stage: &Stage<'_>) -> Checked {
    three(stage, op::MIGRATE_NARROW)
}

fn three(stage: &Stage<'_>, migrate: u32) -> Checked {
    let files = open(stage, 2)?;
    layer(&*files[0])?;
    // The second is the first on the list.
    let (contexts, _map) = mirror(stage, &files)?;
    let [other, own] = &contexts[..] else { return Ok(()) };
    let mut rng = stage.rng();
    let (dropped, migrated) = (Mapping::small(PAGE).doing("mmap")?, Mapping::small(PAGE).doing("mmap")?);
    let patterns = [rng.next(), rng.next()].map(|first| Pattern { first, step: 3 });
    for (map, pattern) in [&dropped, &migrated].into_iter().zip(patterns) {
        map.fill(0, PAGE, pattern);
        own.check(map, 0, PAGE, pattern)?;
    }
    // All have started and allocated before the first goes on: the allocator may want the mmap lock for writing, which C holds.
    let started = Barrier::new(3);
    let thread = |[role, gate, done]: [&str; 3], body: &dyn Fn() -> Checked| {
        drop(std::hint::black_box(Box::new([0_u8; 256])));
        started.wait();
        stage.gates.role(role)?;
        stage.gates.point(gate)?;
        body()?;
        stage.gates.point(done)?;
        stage.gates.role("")
    };
    std::thread::scope(|scope| {
        let a = scope.spawn(|| {
            let drop_page = || dropped.advise(0, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise");
            thread(["A", "a", "a-done"], &drop_page)
        });
        let b = scope.spawn(|| thread(["B", "b", "b-done"], &|| other.file().unbind().doing("unbind")));
        let c = scope.spawn(|| {
            let migrate_page = || act(own.file(), Act { op: migrate, fd: 0, addr: migrated.at(0) });
            thread(["C", "c", "c-done"], &migrate_page)
        });
        [a, b, c].into_iter().try_for_each(join)
    })?;
    // What was dropped is zeros, what was migrated is what it was: to both.
    own.check(&dropped, 0, PAGE, Pattern::ZERO)?;
    own.check(&migrated, 0, PAGE, patterns[1])?;
    own.cpu_check(&migrated, 0, PAGE, patterns[1])
}
