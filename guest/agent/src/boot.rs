// SPDX-License-Identifier: MIT OR Apache-2.0
//! What PID 1 does around the plan: file systems, settings, modules, the end.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use guest_protocol::Message;
use nix::errno::Errno;
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, sync};

use crate::outcome::{Checked, Doing, Failure};
use crate::process::Pause;
use crate::report::{Host, Sink, note};

/// How long a device node may take to appear once its module is loaded, and the last user of a module to go.
const SETTLE: Duration = Duration::from_secs(10);

/// (type, where, options); what a kernel does not have is done without.
const MOUNTS: [(&str, &str, &str); 7] = [
    ("devtmpfs", "/dev", "mode=0755"),
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("tmpfs", "/tmp", "mode=1777"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("debugfs", "/sys/kernel/debug", ""),
    ("tracefs", "/sys/kernel/tracing", ""),
];

/// Settings that the workloads need or that make a hang visible; best effort, since not every kernel has each.
const SYSCTLS: [(&str, &str); 5] = [
    ("kernel/sysrq", "1"),
    ("kernel/hung_task_timeout_secs", "30"),
    // Else as long again goes by until it looks, by chance.
    ("kernel/hung_task_check_interval_secs", "5"),
    // All hung tasks of a run are to be seen, not only the first ten.
    ("kernel/hung_task_warnings", "-1"),
    ("vm/overcommit_memory", "1"),
];

/// Mounts what can be mounted.
pub(crate) fn mount_all() {
    for (kind, target, options) in MOUNTS {
        let _ = std::fs::create_dir_all(target);
        // Already there, or not in this kernel: whoever needs it says so.
        let _ = mount(Some(kind), target, Some(kind), MsFlags::empty(), Some(options));
    }
}

/// Makes the console this process's input and output. The kernel does so only if the initramfs has the node.
pub(crate) fn take_console() {
    if let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") {
        let _ = dup2_stdin(&console);
        let _ = dup2_stdout(&console);
        let _ = dup2_stderr(&console);
    }
}

/// What is known at once.
pub(crate) fn booted() -> Message {
    let kernel = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let uptime = std::fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok())
        .unwrap_or_default();
    Message::Booted { kernel, cpus: cpus(), uptime_ms: (uptime * 1000.0) as u64 }
}

/// CPUs this process may use, which are all that are online.
pub(crate) fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

/// Sets what the kernel lets be set.
pub(crate) fn set_sysctls() {
    for (name, value) in SYSCTLS {
        let _ = std::fs::write(Path::new("/proc/sys").join(name), value);
    }
    // With lockdep every lock costs many times as much: on a busy host one probe takes half a minute to be set. Hangs are judged by
    // heartbeats long before.
    if Path::new("/proc/lockdep").exists() {
        let _ = std::fs::write("/proc/sys/kernel/hung_task_timeout_secs", "120");
    }
}

/// Makes the first group of processes that has memory of its own, for a moment. The kernel patches its code for it, and QEMU's
/// translator is not always up to that while another processor runs that code: here nothing else runs.
pub(crate) fn patch_early() {
    // Whoever needs groups says so if there are none.
    let _ = crate::workload::first_group();
}

/// The names of the modules that are loaded.
fn modules() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/modules").unwrap_or_default();
    text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

/// Loads a module and tells its name: a driver of the user's has one of its own.
pub(crate) fn load_module(path: &str, parameters: &str, host: &Host) -> Checked<String> {
    let before = modules();
    let file = File::open(path).map_err(|error| Failure::wrong(format!("{path}: {error}")))?;
    let parameters =
        CString::new(parameters).map_err(|_| Failure::wrong("module parameters contain a NUL byte"))?;
    finit_module(&file, &parameters, ModuleInitFlags::empty()).doing(&format!("load {path}"))?;
    let module = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
    host.send(&Message::ModuleLoaded { module });
    modules()
        .into_iter()
        .find(|name| !before.contains(name))
        .ok_or_else(|| Failure::wrong(format!("{path} was loaded, and /proc/modules has nothing new")))
}

/// Tells where the code of the modules in `/proc/modules` begins, where the kernel says so.
pub(crate) fn tell_texts(host: &Host) {
    for name in modules() {
        let place = std::fs::read_to_string(format!("/sys/module/{name}/sections/.text")).unwrap_or_default();
        let address = u64::from_str_radix(place.trim().trim_start_matches("0x"), 16);
        if let Some(text) = address.ok().filter(|address| *address != 0) {
            host.send(&Message::ModuleText { module: name, text });
        }
    }
}

/// Waits until a device node exists.
pub(crate) fn wait_for_node(path: &str) -> Checked {
    let until = Instant::now() + SETTLE;
    let mut pause = Pause::default();
    while !Path::new(path).exists() {
        if Instant::now() > until {
            return Err(Failure::wrong(format!("{path} did not appear: the module found no device?")));
        }
        pause.take();
    }
    Ok(())
}

/// Unloads a module that nobody should be using any more.
pub(crate) fn unload_module(name: &str) -> Checked {
    let name = CString::new(name).map_err(|_| Failure::wrong("a module name contains a NUL byte"))?;
    let until = Instant::now() + SETTLE;
    let mut pause = Pause::default();
    loop {
        match delete_module(&name, DeleteModuleFlags::O_NONBLOCK) {
            // Files of processes that have just ended are closed a little later.
            Err(Errno::EAGAIN | Errno::EBUSY) if Instant::now() < until => pause.take(),
            other => return other.doing("delete_module"),
        }
    }
}

/// Asks for a module to go while a file of its device is open, which it must not; if it does, the file is closed. Where there is no
/// device any more there is nothing to see.
pub(crate) fn must_stay(name: &str, device: &str) -> Checked {
    let name = CString::new(name).map_err(|_| Failure::wrong("a module name contains a NUL byte"))?;
    let Ok(file) = File::open(device) else { return Ok(()) };
    let gone = delete_module(&name, DeleteModuleFlags::O_NONBLOCK);
    drop(file);
    match gone {
        Err(Errno::EAGAIN | Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno).doing("delete_module"),
        Ok(()) => Err(Failure::wrong(format!("the module went while {device} was open"))),
    }
}

/// Kills and reaps every other process. Nothing that the plan started is meant to outlive its part of it.
pub(crate) fn end_all_others() {
    let until = Instant::now() + SETTLE;
    let mut pause = Pause::default();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            // No child left. Everything else in user space would be one of ours.
            Err(Errno::ECHILD) => return,
            _ => continue,
        }
        if Instant::now() > until {
            return note("some processes do not end");
        }
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        pause.take();
    }
}

/// Ends the machine.
pub(crate) fn power_off() -> ! {
    sync();
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    note(&format!("power-off: {}", crate::outcome::describe(errno)));
    // PID 1 must not end before the machine does: that would be a panic, and the host would see a panic.
    loop {
        std::thread::sleep(SETTLE);
    }
}

/// What the kernel says of itself for good (Documentation/admin-guide/tainted-kernels.rst).
pub(crate) fn taint() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/kernel/tainted").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// In words, what in these bits of the taint says that something went wrong.
pub(crate) fn trouble(taint: u64) -> Option<String> {
    const TROUBLE: [(u32, &str); 4] =
        [(5, "a bad page"), (7, "an oops"), (9, "a warning"), (14, "a soft lockup")];
    let found: Vec<&str> =
        TROUBLE.iter().filter(|(bit, _)| taint >> bit & 1 != 0).map(|(_, what)| *what).collect();
    (!found.is_empty()).then(|| format!("the kernel is tainted by {}", found.join(" and ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trouble_counts() {
        assert_eq!(trouble(1 << 12 | 1 << 13), None);
        assert_eq!(trouble(1 << 12 | 1 << 9).as_deref(), Some("the kernel is tainted by a warning"));
        assert_eq!(
            trouble(1 << 7 | 1 << 5).as_deref(),
            Some("the kernel is tainted by a bad page and an oops")
        );
    }
}
