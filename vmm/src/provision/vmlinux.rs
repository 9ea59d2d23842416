// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel inside a bzImage, unpacked once at provisioning.
//!
//! A bzImage unpacks itself at every boot, and a translated guest takes about two seconds for that: a third of the way to PID 1.
//! The ELF file inside can be booted directly, through the entry that its PVH note names. Layout of the image:
//! Documentation/arch/x86/boot.rst ("The real-mode kernel header", `payload_offset`); of the note: QEMU and Xen's PVH boot protocol.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use object::Endianness;
use object::elf::{FileHeader64, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};

use super::cache::{Cache, Made, Wanted};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};

/// Change it when what is made of an image changes.
const RECIPE: &str = "unpacked, 1";
/// The name of the file in the cache item.
const FILE: &str = "vmlinux";
/// No kernel unpacks to more than this.
const MOST: usize = 512 << 20;
/// The type of Xen's note that holds the 32-bit entry for PVH.
const PHYS32_ENTRY: u32 = 18;

/// The unpacked kernel of a cached image, made when first asked for; `None`, with a note, where the image cannot be used so:
/// then a machine boots the image itself.
pub(super) fn provide(
    cache: &Cache,
    events: &Arc<dyn EventSink>,
    name: &str,
    image: &std::path::Path,
) -> Result<Option<PathBuf>> {
    let bytes = super::read_input("the kernel", image)?;
    // The image's length and the check sum that kbuild puts at its end tell one package's version from the next.
    let tail = bytes.get(bytes.len().saturating_sub(4)..).unwrap_or_default();
    let recipe = format!("{RECIPE}; {} {tail:02x?}", bytes.len());
    let item = format!("vmlinux-{name}");
    if cache.get(&item, &recipe).is_none() {
        // Whether it can be done is found out before the cache hears of it: no item is made of what cannot.
        match unpack(&bytes) {
            Ok(elf) => {
                let wanted = Wanted {
                    item: &item,
                    step: &item,
                    about: &format!("unpacking the guest kernel '{name}'"),
                    recipe: &recipe,
                    bytes: elf.len() as u64,
                };
                cache.ensure(&wanted, events, &mut |partial| {
                    std::fs::write(partial.path.join(FILE), &elf)
                        .map_err(|e| cache.trouble("writing the unpacked kernel", &e))?;
                    Ok(Made { key_files: vec![FILE.into()], ..Made::default() })
                })?;
            }
            Err(why) => {
                events.event(Event::Note { text: format!("kernel {name} is booted as it is packed: {why}") });
                return Ok(None);
            }
        }
    }
    let item = cache.get(&item, &recipe).ok_or_else(|| {
        Failure::environment(format!("the unpacked kernel {name} is gone from the cache again"))
            .remedy("something removes files from the cache folder; run it again")
    })?;
    Ok(Some(item.path.join(FILE)))
}

/// The ELF kernel in a bzImage, if it can be booted directly. The error says why not.
fn unpack(image: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let payload = payload(image)?;
    let (packed, claimed) = payload.split_at_checked(payload.len().saturating_sub(4)).ok_or("no payload")?;
    let claimed = claimed.try_into().map_or(0, u32::from_le_bytes) as usize;
    if claimed > MOST {
        return Err(format!("it claims to unpack to {claimed} bytes"));
    }
    let elf = match packed.get(..4) {
        Some([0x28, 0xb5, 0x2f, 0xfd]) => zstd(packed, claimed)?,
        Some([0x02, 0x21, 0x4c, 0x18]) => lz4(&packed[4..], claimed)?,
        _ => return Err("it is packed by neither zstd nor lz4".into()),
    };
    if elf.len() != claimed {
        return Err(format!("it unpacks to {} bytes instead of {claimed}", elf.len()));
    }
    if !has_pvh_entry(&elf) {
        return Err("it has no PVH entry (CONFIG_PVH)".into());
    }
    Ok(elf)
}

/// The packed kernel: what `payload_offset` and `payload_length` say, counted from the end of the setup sectors.
fn payload(image: &[u8]) -> std::result::Result<&[u8], String> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("it is no bzImage".into());
    }
    let version = image.get(0x206..0x208).map_or(0, |v| u16::from_le_bytes([v[0], v[1]]));
    if version < 0x208 {
        return Err(format!("its boot protocol, {version:#x}, is older than 2.08"));
    }
    // Zero stands for four.
    let sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let range = || {
        let start = word(0x248)?.checked_add((sectors + 1) * 512)?;
        image.get(start..start.checked_add(word(0x24c)?)?)
    };
    range().ok_or_else(|| "its payload is not inside it".into())
}

fn zstd(packed: &[u8], claimed: usize) -> std::result::Result<Vec<u8>, String> {
    let broken = |error: &dyn std::fmt::Display| format!("its zstd stream is broken: {error}");
    let decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(|e| broken(&e))?;
    let mut elf = Vec::with_capacity(claimed);
    decoder.take(claimed as u64 + 1).read_to_end(&mut elf).map_err(|e| broken(&e))?;
    Ok(elf)
}

/// LZ4's legacy frame, without its magic: blocks of at most 8 MiB unpacked, each behind its packed length.
fn lz4(mut packed: &[u8], claimed: usize) -> std::result::Result<Vec<u8>, String> {
    const BLOCK: usize = 8 << 20;
    let mut elf = Vec::with_capacity(claimed);
    let mut block = vec![0; BLOCK];
    while let Some((length, rest)) = packed.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let (data, rest) = rest.split_at_checked(length).ok_or("its lz4 stream ends too early")?;
        let count = lz4_flex::block::decompress_into(data, &mut block)
            .map_err(|error| format!("its lz4 stream is broken: {error}"))?;
        if elf.len() + count > claimed {
            return Err(format!("it unpacks to more than {claimed} bytes"));
        }
        elf.extend_from_slice(&block[..count]);
        packed = rest;
    }
    Ok(elf)
}

/// Whether the note is there without which no machine could enter the ELF file.
fn has_pvh_entry(elf: &[u8]) -> bool {
    let find = || -> object::Result<bool> {
        let header = FileHeader64::<Endianness>::parse(elf)?;
        let endian = header.endian()?;
        for segment in header.program_headers(endian, elf)? {
            if segment.p_type(endian) != PT_NOTE {
                continue;
            }
            let Some(mut notes) = segment.notes(endian, elf)? else { continue };
            while let Some(note) = notes.next()? {
                if note.name() == b"Xen" && note.n_type(endian) == PHYS32_ENTRY {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    };
    find().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with this payload behind one setup sector.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    /// The smallest ELF file with a PVH note.
    fn elf(note_type: u32) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
        elf[20] = 1;
        elf[32] = 64; // e_phoff
        elf[52] = 64; // e_ehsize
        elf[54] = 56; // e_phentsize
        elf[56] = 1; // e_phnum
        let note = [4, 4, note_type, u32::from_le_bytes(*b"Xen\0"), 0x10_0000];
        elf[64] = 4; // PT_NOTE
        elf[64 + 8] = 120; // p_offset
        elf[64 + 32] = 20; // p_filesz
        elf[64 + 48] = 4; // p_align
        elf.extend(note.iter().flat_map(|word| word.to_le_bytes()));
        elf
    }

    fn lz4_image(elf: &[u8], claimed: usize) -> Vec<u8> {
        let packed = lz4_flex::block::compress(elf);
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
        payload.extend(packed);
        payload.extend(u32::try_from(claimed).unwrap().to_le_bytes());
        image(&payload)
    }

    #[test]
    fn lz4_and_zstd_give_the_kernel_back() {
        let elf = elf(PHYS32_ENTRY);
        assert_eq!(unpack(&lz4_image(&elf, elf.len())).unwrap(), elf);
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let mut payload = ruzstd::encoding::compress_to_vec(elf.as_slice(), level);
        payload.extend(u32::try_from(elf.len()).unwrap().to_le_bytes());
        assert_eq!(unpack(&image(&payload)).unwrap(), elf);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let other = elf;
        let elf = elf(PHYS32_ENTRY);
        let says = |image: &[u8], words: &str| {
            let error = unpack(image).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        says(&lz4_image(&elf, elf.len() - 1), "more than");
        says(&lz4_image(&elf, elf.len() + 1), "instead of");
        says(&lz4_image(&elf, MOST + 1), "claims");
        says(&lz4_image(&other(PHYS32_ENTRY + 1), elf.len()), "PVH");
        says(&image(b"\xfd7zXZ.\0\0\0\0"), "neither");
        says(&image(b"\x28\xb5\x2f\xfd.\0\0\0\0"), "broken");
        says(&image(b""), "neither");
        says(b"MZ", "no bzImage");
        let mut outside = image(b"abcd");
        outside[0x24c] = 5;
        says(&outside, "not inside");
    }

    proptest::proptest! {
        #[test]
        fn no_image_makes_it_panic(header in proptest::collection::vec(proptest::num::u8::ANY, 0..0x300), lz4 in proptest::bool::ANY) {
            let mut image = image(&[0x02, 0x21, 0x4c, 0x18, 9, 0, 0, 0, 1, 2, 3]);
            if lz4 {
                image.truncate(1024 + 16 + 4);
                image.extend_from_slice(&header);
                let length = u32::try_from(4 + header.len()).unwrap();
                image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
            } else {
                image[0x210..][..header.len().min(0x100)].copy_from_slice(&header[..header.len().min(0x100)]);
            }
            let _ = unpack(&image);
            let _ = has_pvh_entry(&header);
        }
    }
}
