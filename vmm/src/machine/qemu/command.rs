// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's arguments. Every resource is an inherited file descriptor; only the kernel is a path.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::Path;

use serde_json::json;

use crate::machine::{Accel, node_bytes};

/// A reply later than this many milliseconds makes QEMU give a function up for good; its own default, 5 s, is less than a loaded
/// host can take.
const MESSAGE_TIMEOUT: u32 = 60_000;
/// PCI slot of the first function; 0 to 3 and 31 are the machine's own.
const FIRST_SLOT: usize = 4;

/// The processor of an outer guest: what the translator has, with its virtualisation, and without what it or KVM on it gets wrong.
///
/// - With XSAVE, an inner kernel finds a state size that differs from the one it computes, warns, and dies; so XSAVE is out, and
///   with it everything that needs it.
/// - Five-level paging makes every nested walk longer for nothing.
/// - With fast strings (ERMS and its successors) kernels copy and clear memory byte by byte, which the translator does literally;
///   without them they do it by words of eight.
///
/// The whole story is in docs/decisions/0007-nested.md.
const OUTER_CPU: &str = "max,+svm,-xsave,-xsaveopt,-xsavec,-xsaves,-xgetbv1,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq,-pku,-pks,-mpx,-la57,-erms,-fsrm,-fzrm,-fsrs,-fsrc";

/// What the arguments are made of.
pub(super) struct Parts<'a> {
    pub kernel: &'a Path,
    pub cmdline: &'a str,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub nodes: u32,
    pub accel: Accel,
    pub initramfs: RawFd,
    pub console: RawFd,
    pub monitor: RawFd,
    /// Name and socket location of each function.
    pub functions: &'a [(&'static str, RawFd)],
    /// The port of an outer guest, and the name it has there.
    pub port: Option<(&'static str, RawFd)>,
    /// An outer guest gets an IOMMU, to hand devices on.
    pub iommu: bool,
    /// A device for it to hand on, beside the functions.
    pub handed: Option<&'static str>,
}

/// The arguments, the program's own excluded.
pub(super) fn arguments(parts: &Parts<'_>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: OsString| {
        arguments.push(option.into());
        arguments.push(value);
    };
    let page = 4096;
    let memory = parts.memory_bytes.div_ceil(page) * page;
    let (accel, cpu, possible) = match parts.accel {
        Accel::Kvm => ("kvm", "host", parts.cpus),
        // With a single possible processor the translator leaves atomic instructions out, and then the device's threads and
        // the guest are not atomic to each other. So there is always room for a second one.
        Accel::Tcg => {
            ("tcg,thread=multi", if parts.port.is_some() { OUTER_CPU } else { "max" }, parts.cpus.max(2))
        }
    };
    // The kernel counts timer interrupts against busy loops, and on a loaded host a translated guest fails that check and hangs.
    // Under KVM it leaves the check out by itself.
    let cmdline = match parts.accel {
        Accel::Kvm => parts.cmdline.to_owned(),
        Accel::Tcg => format!("{} no_timer_check", parts.cmdline),
    };
    let nodes = node_bytes(memory, parts.nodes).unwrap_or_default();
    if nodes.len() > 1 {
        add("-machine", "q35".into());
        for (number, (bytes, cpus)) in nodes.iter().zip(node_cpus(possible, parts.nodes)).enumerate() {
            add("-object", format!("memory-backend-memfd,id=mem{number},size={bytes},share=on").into());
            add("-numa", format!("node,nodeid={number},memdev=mem{number}{cpus}").into());
        }
    } else {
        add("-machine", "q35,memory-backend=mem".into());
        add("-object", format!("memory-backend-memfd,id=mem,size={memory},share=on").into());
    }
    add("-m", format!("{memory}b").into());
    add("-accel", accel.into());
    add("-cpu", cpu.into());
    // A package whose processors are on different nodes makes the kernel warn (topology_sane()).
    let packages =
        if nodes.len() > 1 { format!(",sockets={possible},cores=1,threads=1") } else { String::new() };
    add("-smp", format!("{},maxcpus={possible}{packages}", parts.cpus).into());
    add("-display", "none".into());
    add("-chardev", format!("socket,id=console,fd={}", parts.console).into());
    add("-serial", "chardev:console".into());
    add("-chardev", format!("socket,id=monitor,fd={}", parts.monitor).into());
    add("-qmp", "chardev:monitor".into());
    add("-kernel", parts.kernel.into());
    add("-initrd", descriptor(parts.initramfs).into());
    add("-append", cmdline.into());
    if parts.iommu {
        // Before all devices that it serves. Caching mode tells it of new translations too, not only of those that go.
        add("-device", "intel-iommu,intremap=on,caching-mode=on".into());
    }
    for (index, (name, location)) in parts.functions.iter().enumerate() {
        let device = json!({
            "driver": "vfio-user-pci",
            "id": name,
            "bus": "pcie.0",
            "addr": format!("{:x}", FIRST_SLOT + index),
            "socket": { "type": "unix", "path": descriptor(*location) },
            // The witness's writes must have arrived before the processor goes on.
            "x-no-posted-writes": true,
            "x-msg-timeout": MESSAGE_TIMEOUT,
        });
        add("-device", device.to_string().into());
    }
    if let Some((name, socket)) = parts.port {
        add("-chardev", format!("socket,id=port,fd={socket}").into());
        add("-device", "virtio-serial-pci,id=ports,bus=pcie.0,addr=3,max_ports=2".into());
        add("-device", format!("virtserialport,bus=ports.0,chardev=port,name={name}").into());
    }
    if let Some(device) = parts.handed {
        add("-device", device.into());
    }
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        arguments.push(flag.into());
    }
    arguments
}

/// Which of the possible processors each node has, in QEMU's words; a node may have none. Every one must be on a node.
fn node_cpus(possible: u32, nodes: u32) -> impl Iterator<Item = String> {
    let first = move |node: u32| (u64::from(possible) * u64::from(node)).div_ceil(u64::from(nodes.max(1)));
    (0..nodes).map(move |node| {
        let (first, end) = (first(node), first(node + 1));
        if first == end { String::new() } else { format!(",cpus={first}-{}", end - 1) }
    })
}

fn descriptor(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(accel: Accel, cpus: u32) -> String {
        with_nodes(accel, cpus, 1)
    }

    fn with_nodes(accel: Accel, cpus: u32, nodes: u32) -> String {
        let parts = Parts {
            kernel: Path::new("/boot/a kernel,with a comma"),
            cmdline: "console=ttyS0",
            cpus,
            memory_bytes: (512 << 20) + 1,
            nodes,
            accel,
            initramfs: 10,
            console: 11,
            monitor: 12,
            functions: &[("gpu", 13), ("witness", 14)],
            port: None,
            iommu: false,
            handed: None,
        };
        let arguments: Vec<_> = arguments(&parts).into_iter().map(|a| a.into_string().unwrap()).collect();
        arguments.join("|")
    }

    #[test]
    fn one_translated_processor_leaves_room_for_another() {
        assert!(joined(Accel::Tcg, 1).contains("|-smp|1,maxcpus=2|"));
        assert!(joined(Accel::Tcg, 4).contains("|-smp|4,maxcpus=4|"));
        assert!(joined(Accel::Kvm, 1).contains("|-smp|1,maxcpus=1|"));
    }

    #[test]
    fn every_possible_processor_is_on_a_node() {
        let line = with_nodes(Accel::Tcg, 1, 2);
        for part in [
            "|-smp|1,maxcpus=2,sockets=2,cores=1,threads=1|",
            "-machine|q35|",
            "|memory-backend-memfd,id=mem0,size=268435456,share=on|-numa|node,nodeid=0,memdev=mem0,cpus=0-0|",
            "|memory-backend-memfd,id=mem1,size=268439552,share=on|-numa|node,nodeid=1,memdev=mem1,cpus=1-1|",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!joined(Accel::Tcg, 2).contains("-numa"));
        let cpus = |possible, nodes| node_cpus(possible, nodes).collect::<Vec<_>>();
        assert_eq!(cpus(5, 2), [",cpus=0-2", ",cpus=3-4"]);
        assert_eq!(cpus(1, 2), [",cpus=0-0", ""]);
    }

    #[test]
    fn everything_but_the_kernel_is_a_descriptor() {
        let line = joined(Accel::Tcg, 2);
        for part in [
            "|-kernel|/boot/a kernel,with a comma|",
            "|-initrd|/proc/self/fd/10|",
            "|socket,id=console,fd=11|",
            "|socket,id=monitor,fd=12|",
            r#""path":"/proc/self/fd/13""#,
            r#""path":"/proc/self/fd/14""#,
            r#""x-no-posted-writes":true"#,
            "size=536875008,",
            "|-m|536875008b|",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }
}
