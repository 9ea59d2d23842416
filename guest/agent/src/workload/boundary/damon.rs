// SPDX-License-Identifier: MIT OR Apache-2.0
//! `damon`: the access monitor looks at the process's memory, and reclaims, cools and enlarges it as its schemes say.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::Round;
use super::swap::with_swap;
use super::{Scene, happened};
use crate::device::Device;
use crate::kernel::{Settings, only_in_a_guest, read, write};
use crate::memory::{HUGE, Mapping};
use crate::outcome::{Checked, Doing};
use crate::rng::Rng;

const ADMIN: &str = "/sys/kernel/mm/damon/admin/kdamonds";

const STATISTICS: &str = "/sys/module/damon_stat/parameters/enabled";

/// What schemes do. `stat` only looks; the others act on whatever they find.
pub(in crate::workload) const ACTIONS: [&str; 5] = ["stat", "cold", "pageout", "hugepage", "nohugepage"];

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    for action in ACTIONS {
        round.case(action, |rng| scheme(device, rng, action));
    }
}

/// A monitor that is switched off and taken away when it is dropped.
pub(in crate::workload) struct Monitor(PathBuf);

impl Monitor {
    /// Of this process, with one scheme that applies to every region.
    pub(in crate::workload) fn start(action: &str) -> Checked<Self> {
        let admin = Path::new(ADMIN);
        write(admin.join("nr_kdamonds"), "1")?;
        let monitor = Self(admin.join("0"));
        let context = monitor.0.join("contexts/0");
        write(monitor.0.join("contexts/nr_contexts"), "1")?;
        write(context.join("operations"), "vaddr")?;
        for (name, value) in [("sample_us", "2000"), ("aggr_us", "20000"), ("update_us", "40000")] {
            write(context.join("monitoring_attrs/intervals").join(name), value)?;
        }
        write(context.join("targets/nr_targets"), "1")?;
        write(context.join("targets/0/pid_target"), &std::process::id().to_string())?;
        write(context.join("schemes/nr_schemes"), "1")?;
        let scheme = context.join("schemes/0");
        write(scheme.join("action"), action)?;
        for (range, most) in
            [("sz", u64::MAX), ("nr_accesses", u64::from(u32::MAX)), ("age", u64::from(u32::MAX))]
        {
            let range = scheme.join("access_pattern").join(range);
            write(range.join("min"), "0")?;
            write(range.join("max"), &most.to_string())?;
        }
        write(monitor.0.join("state"), "on")?;
        Ok(monitor)
    }

    /// How often the scheme was tried on a region.
    pub(in crate::workload) fn tried(&self) -> Checked<u64> {
        write(self.0.join("state"), "update_schemes_stats")?;
        let text = read(self.0.join("contexts/0/schemes/0/stats/nr_tried"))?;
        Ok(text.parse().unwrap_or(0))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = write(self.0.join("state"), "off");
        let _ = write(Path::new(ADMIN).join("nr_kdamonds"), "0");
    }
}

/// Switches off a monitor that newer kernels start by themselves, and that lets no other run beside it.
pub(in crate::workload) fn alone(settings: &mut Settings) -> Checked {
    if Path::new(STATISTICS).exists() { settings.set(STATISTICS, "N") } else { Ok(()) }
}

fn scheme(device: &dyn Device, rng: &mut Rng, action: &str) -> Checked {
    only_in_a_guest()?;
    let mut settings = Settings::default();
    alone(&mut settings)?;
    with_swap(|| {
        let mut scene = Scene::new(device, rng, Mapping::huge(2 * HUGE).doing("mmap")?)?;
        let monitor = Monitor::start(action)?;
        let mut tried = 0;
        for _ in 0..6 {
            scene.under_load(rng, |_| {
                std::thread::sleep(Duration::from_millis(60));
                Ok(())
            })?;
            tried = monitor.tried()?;
        }
        drop(monitor);
        scene.rewrite(rng)?;
        scene.hole(rng)?;
        happened(tried > 0, "DAMON tried its scheme on no region")
    })
}
