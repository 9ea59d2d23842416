// SPDX-License-Identifier: MIT OR Apache-2.0
//! The outer guest's files: this program, KVM's modules, and all parts of the run.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

use super::{Errand, InsideQemu, Order, place};
use crate::cli::MachineName;
use crate::failure::{Failure, Result};
use crate::initramfs::Initramfs;
use crate::process::die_with_parent;
use crate::provision::{Kernel, QemuProgram};
use crate::runner::RunConfig;
use crate::runner::device::memfd;
use crate::runner::parts::Parts;

/// What the KVM of an AMD processor consists of, in the order of loading. The first is built in or absent in some kernels.
const KVM_MODULES: &[(&str, &str, bool)] =
    &[("virt/lib", "irqbypass", false), ("arch/x86/kvm", "kvm", true), ("arch/x86/kvm", "kvm-amd", true)];
/// And what hands a device on: by iommufd, by its group, or either; a kernel has what it has.
const VFIO_MODULES: &[(&str, &str, bool)] = &[
    ("drivers/iommu/iommufd", "iommufd", false),
    ("drivers/vfio", "vfio", true),
    ("drivers/vfio", "vfio_iommu_type1", false),
    ("drivers/vfio/pci", "vfio-pci-core", true),
    ("drivers/vfio/pci", "vfio-pci", true),
];
/// What QEMU reads beside its own program when a kernel is given to it and no display is wanted.
const FIRMWARE: &[&str] =
    &["bios-256k.bin", "bios-microvm.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"];

/// The outer guest's first file system, and how large it is.
pub(crate) struct Image {
    /// The archive, as an anonymous file.
    pub file: File,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Puts it together. `inner` are the inner guest's files, as [`crate::runner::parts::initramfs`] has made them.
pub(crate) fn build(
    errand: Errand,
    config: &RunConfig,
    parts: &Parts,
    outer: &Kernel,
    inner: &mut File,
    qemu: &QemuProgram,
) -> Result<Image> {
    let mut tree = Initramfs::new();
    for dir in ["/dev", "/proc", "/sys", "/tmp", "/run"] {
        tree.dir(dir, 0o755)?;
    }
    tree.node("/dev/console", 0o600, 5, 1)?;
    add_ourselves(&mut tree)?;
    let modules = add_modules(&mut tree, outer, config.vfio.is_some())?;
    tree.file(place::KERNEL, 0o644, read(&parts.kernel.image)?)?;
    let mut bytes = Vec::new();
    inner
        .seek(SeekFrom::Start(0))
        .and_then(|_| inner.read_to_end(&mut bytes))
        .map_err(|error| Failure::environment(format!("cannot read the guest's files back: {error}")))?;
    tree.file(place::INITRAMFS, 0o644, bytes)?;
    let qemu = match config.machine {
        MachineName::Qemu => Some(add_qemu(&mut tree, qemu)?),
        MachineName::Kvm => None,
    };
    let order = Order {
        errand,
        config: absolute(config),
        kernel_name: parts.kernel.name.clone(),
        kernel_release: parts.kernel.release.clone(),
        modules,
        qemu,
    };
    let order = serde_json::to_vec(&order)
        .map_err(|error| Failure::environment(format!("cannot write the order (a defect): {error}")))?;
    tree.file(place::ORDER, 0o644, order)?;
    let bytes = tree.finish()?;
    let mut file = memfd("hmm-testbench-outer-initramfs", 0)?;
    file.write_all(&bytes)
        .map_err(|error| Failure::environment(format!("cannot keep the outer guest's files: {error}")))?;
    Ok(Image { file, bytes: bytes.len() as u64 })
}

/// The run with every path such that its replay commands mean the same files from any folder.
fn absolute(config: &RunConfig) -> RunConfig {
    let whole = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut config = config.clone();
    if Path::new(&config.kernel).is_dir() {
        config.kernel = whole(Path::new(&config.kernel)).to_string_lossy().into_owned();
    }
    config.driver = config.driver.as_deref().map(whole);
    config.patches = config.patches.iter().map(|patch| whole(patch)).collect();
    for add in &mut config.add {
        add.host = whole(&add.host);
    }
    if let Some(allow) = &mut config.allow {
        allow.file = whole(&allow.file);
    }
    // There is no such folder inside.
    config.out = None;
    config
}

/// This very program as `/init`, with its libraries where its loader looks for them.
fn add_ourselves(tree: &mut Initramfs) -> Result<()> {
    let ourselves = Path::new("/proc/self/exe");
    // With its libraries first; then without what only a debugger reads, which is most of it.
    tree.add_host(ourselves, "/init").map_err(|failure| {
        Failure::environment(format!("this program cannot be put into the outer guest: {failure}"))
    })?;
    tree.file("/init", 0o755, loaded_part(read(ourselves)?))?;
    Ok(())
}

/// An ELF program without what is never loaded: symbols, debugging data and the table of sections. Left as it is if it is not
/// such a program.
fn loaded_part(mut bytes: Vec<u8>) -> Vec<u8> {
    /// Where the header has the section table's offset, and its entries' count and string index.
    const SHOFF: usize = 0x28;
    const SHNUM: usize = 0x3c;
    let Some(end) = loaded_end(&bytes) else { return bytes };
    bytes.truncate(end);
    bytes[SHOFF..SHOFF + 8].fill(0);
    bytes[SHNUM..SHNUM + 4].fill(0);
    bytes
}

/// The end of the last segment that is loaded.
fn loaded_end(bytes: &[u8]) -> Option<usize> {
    let header = FileHeader64::<Endianness>::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    if header.e_machine(endian) != elf::EM_X86_64 {
        return None;
    }
    let segments = header.program_headers(endian, bytes).ok()?;
    let ends = segments.iter().filter(|segment| segment.p_type(endian) == PT_LOAD);
    let end = ends.map(|segment| segment.p_offset(endian).saturating_add(segment.p_filesz(endian))).max()?;
    usize::try_from(end).ok().filter(|end| (0x40..=bytes.len()).contains(end))
}

/// KVM's modules, and those of VFIO if wanted; their paths in the outer guest, in the order of loading.
fn add_modules(tree: &mut Initramfs, kernel: &Kernel, vfio: bool) -> Result<Vec<PathBuf>> {
    let lacks = |what: &str| {
        Failure::environment(format!("the outer guest's kernel {} {what}", kernel.release))
            .remedy("give another --outer-kernel, or none; `hmm-testbench list kernels` has them")
    };
    let dir = kernel.modules_dir().ok_or_else(|| lacks("has no modules"))?.join("kernel");
    let mut found = Vec::new();
    for (subdir, name, needed) in KVM_MODULES.iter().chain(if vfio { VFIO_MODULES } else { &[] }) {
        let file = [".ko", ".ko.xz", ".ko.zst"]
            .iter()
            .map(|end| dir.join(subdir).join(format!("{name}{end}")))
            .find(|file| file.is_file());
        let Some(file) = file else {
            if *needed {
                return Err(lacks(&format!("has no module {name}")));
            }
            continue;
        };
        let compressed = file.extension().is_some_and(|end| end != "ko");
        if compressed && kernel.option("MODULE_DECOMPRESS").as_deref() != Some("y") {
            return Err(lacks("does not load compressed modules"));
        }
        let file_name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let guest = format!("{}/{file_name}", place::MODULES);
        tree.file(&guest, 0o644, read(&file)?)?;
        found.push(PathBuf::from(guest));
    }
    Ok(found)
}

/// QEMU with its loader, its libraries and the little firmware it needs, in a folder of its own.
///
/// Its libraries are those that its own loader names: they need not be the host's.
fn add_qemu(tree: &mut Initramfs, qemu: &QemuProgram) -> Result<InsideQemu> {
    let trouble =
        |what: String| Failure::environment(format!("QEMU cannot be put into the outer guest: {what}"));
    let (loader, search, binary) = qemu.anatomy().map_err(trouble)?;
    let mut command = Command::new(&loader);
    if let Some(search) = &search {
        command.arg("--library-path").arg(search);
    }
    command.arg("--list").arg(&binary);
    let listed = die_with_parent(&mut command).output().map_err(|error| trouble(error.to_string()))?;
    if !listed.status.success() {
        return Err(trouble(String::from_utf8_lossy(&listed.stderr).trim().to_owned()));
    }
    let lib = format!("{}/lib", place::QEMU);
    for library in libraries(&String::from_utf8_lossy(&listed.stdout)) {
        let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
        tree.file(&format!("{lib}/{name}"), 0o755, read(&library)?)?;
    }
    let (inside_loader, inside_binary) = (format!("{lib}/loader.so"), format!("{}/qemu", place::QEMU));
    tree.file(&inside_loader, 0o755, read(&loader)?)?;
    tree.file(&inside_binary, 0o755, read(&binary)?)?;
    let share = format!("{}/share", place::QEMU);
    tree.dir(&share, 0o755)?;
    for name in FIRMWARE {
        let mut files = qemu.data_folders().into_iter().map(|dir| dir.join(name));
        if let Some(file) = files.find(|file| file.is_file()) {
            tree.file(&format!("{share}/{name}"), 0o644, read(&file)?)?;
        }
    }
    Ok(InsideQemu {
        program: inside_loader.into(),
        args: vec!["--library-path".into(), lib, inside_binary, "-L".into(), share],
        version: qemu.version.clone(),
    })
}

/// The files in a loader's list: lines such as `libc.so.6 => /lib/libc.so.6 (0x7f00)`.
fn libraries(list: &str) -> Vec<PathBuf> {
    list.lines()
        .filter_map(|line| Some(line.split_once("=>")?.1.trim().split(" (").next()?.to_owned()))
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| Failure::environment(format!("cannot read {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_program_without_its_debugging_data_still_runs() {
        let whole = fs::read("/proc/self/exe").unwrap();
        let loaded = loaded_part(whole.clone());
        assert!(loaded.len() < whole.len());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        fs::write(&path, loaded).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let status = Command::new(&path).args(["--list", "--quiet"]).output().unwrap().status;
        assert!(status.success());
    }

    #[test]
    fn what_is_no_program_is_left_alone() {
        for bytes in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &[0; 100]] {
            assert_eq!(loaded_part(bytes.to_vec()), bytes);
        }
    }

    #[test]
    fn a_loaders_list() {
        let list = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibz.so.1 => /a b/libz.so.1 (0x00007f)\n\t/lib64/ld.so (0x0)\n\tx => not found\n";
        assert_eq!(libraries(list), [PathBuf::from("/a b/libz.so.1")]);
    }
}
