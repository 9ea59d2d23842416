// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loads the kernel, and writes what it is started with: the Linux boot protocol's 64-bit entry for a bzImage, PVH for an ELF
//! image.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_memory_of_loader as loader_memory;
use vm_memory_of_loader::ByteValued;

use super::layout::{
    ACPI, CMDLINE, CMDLINE_BYTES, GDT, HIGH_MEMORY, Layout, PAGE, PAGE_TABLES, PVH_INFO, RESET_VECTOR,
    ZERO_PAGE,
};
use crate::failure::{Failure, Result};

/// A bzImage that says it can be entered in 64-bit mode.
const XLF_KERNEL_64: u16 = 1 << 0;
/// Where that entry is, from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Highest address of an initial file system that every kernel takes.
const INITRAMFS_TOP: u64 = 0x7fff_ffff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const ZERO_PAGE_BYTES: usize = 4096;

/// All that there is of a firmware. A Linux that was not booted by EFI restarts a hardware-reduced machine by going there:
/// `mov dx, 0xcf9; mov al, 6; out dx, al; hlt; jmp` back to the `hlt`.
const RESET_CODE: [u8; 9] = [0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd];

// Offsets in the zero page.
const ZP_RSDP: usize = 0x70;
const ZP_E820_COUNT: usize = 0x1e8;
const ZP_HEADER: usize = 0x1f1;
const ZP_E820: usize = 0x2d0;

/// How the first processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// In 64-bit mode with the first 4 GiB mapped, the zero page in RSI.
    Long(u64),
    /// In 32-bit mode without paging, the start information in EBX.
    Pvh(u64),
}

/// Puts kernel, initial file system, command line and memory map into the guest's memory.
pub(super) fn load(
    memory: &GuestMemoryMmap<()>,
    layout: &Layout,
    kernel: &Path,
    initramfs: &mut File,
    cmdline: &str,
) -> Result<Entry> {
    let unusable = |what: String| Failure::usage(format!("the kernel {}: {what}", kernel.display()));
    let mut image = File::open(kernel)
        .map_err(|error| Failure::environment(format!("cannot read {}: {error}", kernel.display())))?;
    let low = low_memory(memory)?;
    let mut magic = [0; 4];
    image.read_exact(&mut magic).map_err(|error| unusable(format!("cannot be read: {error}")))?;
    if cmdline.len() as u64 >= CMDLINE_BYTES || cmdline.contains('\0') {
        return Err(Failure::usage(format!("a kernel command line of {} bytes is too long", cmdline.len())));
    }
    write(memory, CMDLINE, cmdline.as_bytes())?;
    if magic == *b"\x7fELF" {
        let loaded = Elf::load(&low, None, &mut image, Some(loader_memory::GuestAddress(HIGH_MEMORY)))
            .map_err(|error| unusable(format!("is no ELF image that fits: {error}")))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(unusable("is an ELF image without a PVH entry".into())
                .remedy("give a bzImage, or one built with CONFIG_PVH"));
        };
        let initramfs = Initramfs::load(memory, layout, initramfs, loaded.kernel_end, INITRAMFS_TOP)?;
        write(memory, PVH_INFO, &start_info(layout, &initramfs))?;
        return Ok(Entry::Pvh(entry.0));
    }
    let mut header =
        peek(&mut image).ok_or_else(|| unusable("is neither a bzImage nor an ELF image".into()))?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(
            unusable("has no 64-bit entry".into()).remedy("give a 64-bit kernel of Linux 3.8 or later")
        );
    }
    // Where it wants to run, it need not move itself.
    let room = u64::from(header.init_size);
    let at = header.pref_address.max(HIGH_MEMORY);
    let end = at.checked_add(room).filter(|end| *end <= layout.low_bytes());
    let end = end.ok_or_else(|| {
        unusable(format!("needs {room:#x} bytes at {at:#x}, which is more than the guest has"))
    })?;
    let loaded = BzImage::load(&low, Some(loader_memory::GuestAddress(at)), &mut image, None)
        .map_err(|error| unusable(format!("cannot be loaded: {error}")))?;
    let initramfs = Initramfs::load(
        memory,
        layout,
        initramfs,
        end.max(loaded.kernel_end),
        u64::from(header.initrd_addr_max).min(INITRAMFS_TOP),
    )?;
    header.type_of_loader = 0xff;
    header.cmd_line_ptr = CMDLINE as u32;
    header.ramdisk_image = initramfs.at as u32;
    header.ramdisk_size = initramfs.bytes as u32;
    write(memory, ZERO_PAGE, &zero_page(layout, &header))?;
    write(memory, PAGE_TABLES, &identity_tables())?;
    Ok(Entry::Long(at + ENTRY_64))
}

/// The memory below the hole once more, for as long as the kernel is loaded: the loader has types of its own (see Cargo.toml).
fn low_memory(memory: &GuestMemoryMmap<()>) -> Result<loader_memory::GuestMemoryMmap<()>> {
    let fail = |error: &dyn std::fmt::Display| {
        Failure::environment(format!("cannot map the guest's memory for the kernel: {error}"))
    };
    let region = memory.find_region(GuestAddress(0)).ok_or_else(|| fail(&"there is none"))?;
    let place = region.file_offset().ok_or_else(|| fail(&"it has no file"))?;
    let file = place.file().try_clone().map_err(|error| fail(&error))?;
    let bytes = usize::try_from(region.len()).map_err(|error| fail(&error))?;
    let file = loader_memory::FileOffset::new(file, place.start());
    loader_memory::GuestMemoryMmap::from_ranges_with_files([(
        loader_memory::GuestAddress(0),
        bytes,
        Some(file),
    )])
    .map_err(|error| fail(&error))
}

/// Writes what is in the firmware's place.
pub(super) fn write_firmware(memory: &GuestMemoryMmap<()>, layout: &Layout, cpus: u32) -> Result<()> {
    let tables = super::acpi::tables(layout, cpus)
        .ok_or_else(|| Failure::environment("the ACPI tables do not fit (a defect)"))?;
    write(memory, ACPI, &tables)?;
    write(memory, RESET_VECTOR, &RESET_CODE)
}

/// Writes the descriptor table of the first processor.
pub(super) fn write_gdt(memory: &GuestMemoryMmap<()>, descriptors: &[u64]) -> Result<()> {
    let bytes: Vec<u8> = descriptors.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    write(memory, GDT, &bytes)
}

fn write(memory: &GuestMemoryMmap<()>, at: u64, bytes: &[u8]) -> Result<()> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|error| Failure::environment(format!("cannot write the guest's memory at {at:#x}: {error}")))
}

/// The header of a bzImage.
fn peek(image: &mut File) -> Option<setup_header> {
    let mut bytes = [0; size_of::<setup_header>()];
    image.seek(std::io::SeekFrom::Start(ZP_HEADER as u64)).ok()?;
    image.read_exact(&mut bytes).ok()?;
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(&bytes);
    (header.header == u32::from_le_bytes(*b"HdrS")).then_some(header)
}

/// The initial file system in the guest's memory.
struct Initramfs {
    at: u64,
    bytes: u64,
}

impl Initramfs {
    /// Puts it as high as it may be, `below` what it must not touch.
    fn load(
        memory: &GuestMemoryMmap<()>,
        layout: &Layout,
        file: &mut File,
        kernel_end: u64,
        top: u64,
    ) -> Result<Self> {
        let fail = |what: String| Failure::environment(format!("the initial file system: {what}"));
        let bytes = file.metadata().map_err(|error| fail(error.to_string()))?.len();
        file.rewind().map_err(|error| fail(error.to_string()))?;
        let end = layout.low_bytes().min(top.saturating_add(1));
        let at = end.checked_sub(bytes).map(|at| at / PAGE * PAGE).filter(|at| *at >= kernel_end);
        let at = at.ok_or_else(|| {
            Failure::usage(format!("the guest's files ({} MiB) and its kernel do not fit", bytes >> 20))
                .remedy("give the guest more with --memory")
        })?;
        let length = usize::try_from(bytes).map_err(|error| fail(error.to_string()))?;
        memory
            .read_exact_volatile_from(GuestAddress(at), file, length)
            .map_err(|error| fail(error.to_string()))?;
        Ok(Self { at, bytes })
    }
}

fn zero_page(layout: &Layout, header: &setup_header) -> Vec<u8> {
    let mut page = vec![0; ZERO_PAGE_BYTES];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(ZP_HEADER, header.as_slice());
    put(ZP_RSDP, &ACPI.to_le_bytes());
    let map = layout.memory_map();
    put(ZP_E820_COUNT, &[map.len() as u8]);
    for (i, (start, bytes, ram)) in map.into_iter().enumerate() {
        let at = ZP_E820 + 20 * i;
        put(at, &start.to_le_bytes());
        put(at + 8, &bytes.to_le_bytes());
        put(at + 16, &kind(ram).to_le_bytes());
    }
    page
}

fn kind(ram: bool) -> u32 {
    if ram { E820_RAM } else { E820_RESERVED }
}

/// The PVH start information, version 1, with its module list and memory map right behind it.
fn start_info(layout: &Layout, initramfs: &Initramfs) -> Vec<u8> {
    const INFO: u64 = 56;
    const MODULE: u64 = 32;
    let map = layout.memory_map();
    let words32 = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let words64 = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let mut bytes = words32(&[0x336e_c578, 1, 0, 1]);
    bytes.extend(words64(&[PVH_INFO + INFO, CMDLINE, ACPI, PVH_INFO + INFO + MODULE]));
    bytes.extend(words32(&[map.len() as u32, 0]));
    bytes.extend(words64(&[initramfs.at, initramfs.bytes, 0, 0]));
    for (start, length, ram) in map {
        bytes.extend(words64(&[start, length]));
        bytes.extend(words32(&[kind(ram), 0]));
    }
    bytes
}

/// The first 4 GiB at their own addresses.
fn identity_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let mut words = vec![0_u64; 6 * 512];
    words[0] = (PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    for table in 0..4 {
        words[512 + table] = (PAGE_TABLES + (2 + table as u64) * PAGE) | PRESENT_WRITABLE;
    }
    for (number, word) in words[1024..].iter_mut().enumerate() {
        *word = (number as u64) << 21 | PRESENT_WRITABLE | LARGE;
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::memory::GuestRam;
    use super::*;

    fn machine() -> (Layout, GuestRam) {
        let layout = Layout::new(64 << 20, 40).unwrap();
        let ram = GuestRam::new(&layout).unwrap();
        (layout, ram)
    }
    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }
    fn initramfs(bytes: u64) -> File {
        crate::runner::device::memfd("test", bytes).unwrap()
    }
    fn image(init_size: u32) -> Vec<u8> {
        let header = setup_header {
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x20f,
            loadflags: 1,
            setup_sects: 1,
            xloadflags: XLF_KERNEL_64,
            pref_address: 0x100_0000,
            init_size,
            initrd_addr_max: 0x7fff_ffff,
            ..Default::default()
        };
        let mut bytes = vec![0; 2048];
        bytes[ZP_HEADER..ZP_HEADER + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        bytes[1024..1028].copy_from_slice(b"code");
        bytes
    }

    #[test]
    fn a_bzimage() {
        let (layout, ram) = machine();
        let kernel = file(&image(0x1000));
        let entry = load(&ram.map, &layout, kernel.path(), &mut initramfs(5000), "quiet").unwrap();
        assert_eq!(entry, Entry::Long(0x100_0200));
        let mut code = [0; 4];
        ram.map.read_slice(&mut code, GuestAddress(0x100_0000)).unwrap();
        assert_eq!(&code, b"code");
        let mut page = vec![0; 4096];
        ram.map.read_slice(&mut page, GuestAddress(ZERO_PAGE)).unwrap();
        let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
        assert_eq!((word(0x218), word(0x21c), word(0x228)), ((64 << 20) - 8192, 5000, CMDLINE as u32));
        assert_eq!(page[ZP_E820_COUNT], 4);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let (layout, ram) = machine();
        let mut old = image(0x1000);
        old[0x236] = 0;
        for bytes in [b"".to_vec(), b"\x7fELF".to_vec(), vec![0; 5000], vec![0xff; 700], image(u32::MAX), old]
        {
            let kernel = file(&bytes);
            let error = load(&ram.map, &layout, kernel.path(), &mut initramfs(0), "").unwrap_err();
            assert_eq!(error.kind.exit_status(), 2, "{error}");
        }
        let kernel = file(&image(0x1000));
        assert!(load(&ram.map, &layout, kernel.path(), &mut initramfs(60 << 20), "").is_err());
        assert!(load(&ram.map, &layout, kernel.path(), &mut initramfs(0), &"x".repeat(70_000)).is_err());
    }
}
