// SPDX-License-Identifier: MIT OR Apache-2.0
//! `numa`: hinting takes the rights from pages to see who uses them, and pages move between nodes.
//!
//! The QEMU machine has two nodes for this workload; the native machine has one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::Round;
use super::{Scene, grew, happened};
use crate::device::Device;
use crate::kernel::{Settings, move_pages, only_in_a_guest, read, vmstat, within};
use crate::memory::{HUGE, Mapping, PAGE, WINDOW};
use crate::outcome::{Checked, Doing, Failure};
use crate::rng::Rng;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("hinting/4k", |rng| hinting(device, rng, Mapping::small(4 * WINDOW).doing("mmap")?));
    round.case("hinting/thp", |rng| hinting(device, rng, Mapping::huge(2 * HUGE).doing("mmap")?));
    round.case("move-pages", |rng| moves(device, rng));
}

/// The last node's number.
pub(in crate::workload) fn last_node() -> Checked<i32> {
    let online = read("/sys/devices/system/node/online")?;
    let last = online.rsplit(['-', ',']).next().unwrap_or_default();
    last.parse().map_err(|_| Failure::wrong(format!("the nodes online are {online:?}")))
}

pub(in crate::workload) fn one_node() -> Failure {
    Failure::Skip(
        "the guest has one node; --machine qemu has two for numa, or as many as --nodes says".to_owned(),
    )
}

/// Switches hinting on, at a pace at which something happens.
pub(in crate::workload) fn eager(settings: &mut Settings) -> Checked {
    settings.set("/proc/sys/kernel/numa_balancing", "1")?;
    [("scan_delay_ms", "0"), ("scan_period_min_ms", "10"), ("scan_period_max_ms", "50")].iter().try_for_each(
        |(name, value)| settings.set(format!("/sys/kernel/debug/sched/numa_balancing/{name}"), value),
    )
}

fn hinting(device: &dyn Device, rng: &mut Rng, map: Mapping) -> Checked {
    only_in_a_guest()?;
    if last_node()? == 0 {
        return Err(one_node());
    }
    let mut settings = Settings::default();
    eager(&mut settings)?;
    let mut scene = Scene::new(device, rng, map)?;
    let before = vmstat("numa_pte_updates");
    let done = AtomicBool::new(false);
    // The kernel scans for a task that runs, and spares processes with one thread.
    let seen = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                scene.map.load(0);
            }
        });
        let mut seen = Ok(false);
        for _ in 0..6 {
            let result = scene.under_load(rng, |_| {
                seen = within(Duration::from_millis(150), || Ok(grew("numa_pte_updates", before)));
                Ok(())
            });
            if result.is_err() {
                seen = result.map(|()| false);
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
        seen
    })?;
    scene.rewrite(rng)?;
    scene.hole(rng)?;
    happened(seen, "the scheduler gave no hints")
}

/// To every node in turn, under a device at work.
fn moves(device: &dyn Device, rng: &mut Rng) -> Checked {
    let last = last_node()?;
    if last == 0 {
        return Err(one_node());
    }
    let mut scene = Scene::small(device, rng, 128)?;
    let pages: Vec<u64> = (0..scene.bytes()).step_by(PAGE).map(|at| scene.map.at(at)).collect();
    let mut moved = 0;
    for round in 0..4 {
        scene.under_load(rng, |_| {
            let node = round % (last + 1);
            let status = move_pages(&pages, node).doing("move_pages")?;
            moved += status.iter().filter(|&&at| at == node).count();
            Ok(())
        })?;
        scene.rewrite(rng)?;
    }
    scene.hole(rng)?;
    happened(moved > 0, "no page moved")
}
