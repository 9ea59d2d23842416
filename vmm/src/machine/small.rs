// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests of some instructions, for benchmarks and tests: an ELF image that every machine here boots by its PVH note.

/// Where the code is in the guest's memory, and begins: in 32-bit protected mode, without paging, with flat segments.
pub const CODE: u32 = 0x10_0000;

/// An ELF image with a PVH note and 32-bit `code`, which may be written.
#[must_use]
pub fn image(code: &[u8]) -> Vec<u8> {
    const NOTE: u64 = 64 + 2 * 56;
    const NOTE_BYTES: u64 = 20;
    /// The physical address of an entry in 32-bit mode, in a note of owner "Xen".
    const ENTRY: u32 = 18;
    let begin = NOTE + NOTE_BYTES;
    let half = |bytes: &mut Vec<u8>, words: &[u16]| words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    let word = |bytes: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    let long = |bytes: &mut Vec<u8>, words: &[u64]| words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    half(&mut bytes, &[2, 62]);
    word(&mut bytes, &[1]);
    long(&mut bytes, &[CODE.into(), 64, 0]);
    word(&mut bytes, &[0]);
    half(&mut bytes, &[64, 56, 2, 0, 0, 0]);
    let segments = [(1, begin, u64::from(CODE), code.len() as u64), (4, NOTE, 0, NOTE_BYTES)];
    for (kind, offset, at, length) in segments {
        word(&mut bytes, &[kind, 7]);
        long(&mut bytes, &[offset, at, at, length, length, 4]);
    }
    word(&mut bytes, &[4, 4, ENTRY]);
    bytes.extend(b"Xen\0");
    word(&mut bytes, &[CODE]);
    bytes.extend(code);
    bytes
}
