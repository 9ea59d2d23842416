// SPDX-License-Identifier: MIT OR Apache-2.0
//! What system calls the machine's threads keep. A thread that makes another one ends the process: it is no longer ours. Opening
//! a file is refused instead, since the C library tries to by itself.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::failure::{Failure, Result};

/// Memory, waiting, time, ending, and signals: what every thread of a Rust program may need.
const COMMON: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
];
/// What fails with EACCES and ends nobody. glibc reads `/proc/sys/vm/overcommit_memory` when it gives memory of a thread's heap back
/// for the first time (`check_may_shrink_heap()`), which is any `free()`, and does without it where it may not; so does what names
/// the frames of a panic.
const REFUSED: &[libc::c_long] = &[libc::SYS_open, libc::SYS_openat];
/// What a processor asks of KVM while it runs, when the guest moves BARs or sets interrupts up, and when it has failed.
const KVM_CALLS: &[u64] =
    &[KVM_RUN, KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_GSI_ROUTING, KVM_SET_MEMORY, KVM_IRQFD];
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
const KVM_SET_MEMORY: u64 = 0x4020_ae46;
const KVM_IRQFD: u64 = 0x4020_ae76;
/// What it asks of a device that is handed over.
const VFIO_CALLS: &[u64] = &[VFIO_DEVICE_SET_IRQS, VFIO_DEVICE_RESET];
const VFIO_DEVICE_SET_IRQS: u64 = 0x3b6e;
const VFIO_DEVICE_RESET: u64 = 0x3b6f;

/// What one thread keeps: two filters, since one knows only two answers. Of two the kernel takes the harder.
type Kept = [BpfProgram; 2];

/// The filters, ready to be put on threads; empty ones filter nothing.
#[derive(Clone, Default)]
pub(super) struct Filters {
    /// Of a processor.
    pub(super) vcpu: Kept,
    /// Of a thread that carries the console's bytes.
    pub(super) console: Kept,
}

impl Filters {
    /// Makes them, also for devices that are handed over if `vfio`; empty ones, which filter nothing, if they are not wanted.
    pub(super) fn new(wanted: bool, vfio: bool) -> Result<Self> {
        if !wanted {
            return Ok(Self::default());
        }
        let fail = |error: seccompiler::BackendError| {
            Failure::environment(format!("cannot make a filter of system calls (a defect): {error}"))
        };
        let mut ioctl = Vec::new();
        for call in KVM_CALLS.iter().chain(if vfio { VFIO_CALLS } else { &[] }) {
            let is =
                SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *call).map_err(fail)?;
            ioctl.push(SeccompRule::new(vec![is]).map_err(fail)?);
        }
        // Only to see whether a descriptor is open, which debug builds do before they close one.
        let is_open =
            SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::F_GETFD as u64);
        let is_open = SeccompRule::new(vec![is_open.map_err(fail)?]).map_err(fail)?;
        let each =
            |calls: &[libc::c_long]| calls.iter().map(|call| (*call, Vec::new())).collect::<BTreeMap<_, _>>();
        let common = || {
            let mut calls = each(COMMON);
            calls.extend(each(REFUSED));
            calls.insert(libc::SYS_fcntl, vec![is_open.clone()]);
            calls
        };
        let mut vcpu = common();
        vcpu.insert(libc::SYS_ioctl, ioctl);
        if vfio {
            vcpu.insert(libc::SYS_pread64, Vec::new());
            vcpu.insert(libc::SYS_pwrite64, Vec::new());
        }
        let mut console = common();
        for call in [libc::SYS_poll, libc::SYS_ppoll, libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_writev]
        {
            console.insert(call, Vec::new());
        }
        let compile = |rules, mismatch, matching| {
            let filter = SeccompFilter::new(rules, mismatch, matching, TargetArch::x86_64)?;
            BpfProgram::try_from(filter)
        };
        let (allow, kill) = (SeccompAction::Allow, SeccompAction::KillProcess);
        let refuse = SeccompAction::Errno(libc::EACCES as u32);
        let refused = compile(each(REFUSED), allow.clone(), refuse).map_err(fail)?;
        let kept = |rules| Ok([refused.clone(), compile(rules, kill.clone(), allow.clone()).map_err(fail)?]);
        Ok(Self { vcpu: kept(vcpu)?, console: kept(console)? })
    }
}

/// Puts filters on this thread, for good.
pub(super) fn apply(filters: &Kept) -> Result<()> {
    for filter in filters.iter().filter(|filter| !filter.is_empty()) {
        seccompiler::apply_filter(filter)
            .map_err(|error| Failure::environment(format!("cannot give up system calls: {error}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Output};

    use super::*;

    /// A call that is not allowed would end the whole test program.
    fn under(filters: &Kept, what: impl FnOnce() + Send + 'static) {
        let filters = filters.clone();
        let run = move || {
            apply(&filters).unwrap();
            what();
        };
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn a_file_is_refused() {
        let filters = Filters::new(true, false).unwrap();
        for kept in [&filters.vcpu, &filters.console] {
            under(kept, || {
                let error = std::fs::File::open("/proc/self/maps").unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EACCES));
            });
        }
    }

    /// Does `what` in a process of its own, which is the test of that name once more; how that ended. None in that process.
    fn alone(test: &str, what: impl FnOnce()) -> Option<Output> {
        const CHILD: &str = "HMM_TESTBENCH_SECCOMP_CHILD";
        if std::env::var_os(CHILD).is_some() {
            what();
            return None;
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let name = format!("machine::kvm::seccomp::tests::{test}");
        Some(child.args(["--exact", &name]).env(CHILD, "").output().unwrap())
    }

    /// The C library finds out once a process whether heaps may shrink: only the first to ask opens a file.
    #[test]
    fn memory_is_given_back() {
        let child = alone("memory_is_given_back", || {
            under(&Filters::new(true, false).unwrap().vcpu, || {
                // Enough of a thread's own heap that it is made smaller, in pieces that are no mappings of their own.
                let pieces: Vec<Vec<u8>> = (0..2048).map(|_| std::hint::black_box(vec![1; 4096])).collect();
                assert!(pieces.iter().all(|piece| piece[4095] == 1));
                drop(pieces);
            });
        });
        // A program that finds no such test has done nothing, and well.
        let done = |child: &Output| String::from_utf8_lossy(&child.stdout).contains("1 passed");
        assert!(child.as_ref().is_none_or(done), "{child:?}");
    }

    #[test]
    fn anything_else_ends_the_process() {
        let child = alone("anything_else_ends_the_process", || {
            under(&Filters::new(true, false).unwrap().vcpu, || {
                let _ = nix::unistd::getppid();
            });
        });
        let killed = |child: &Output| child.status.signal() == Some(libc::SIGSYS);
        assert!(child.as_ref().is_none_or(killed), "{child:?}");
    }
}
