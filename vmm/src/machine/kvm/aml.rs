// SPDX-License-Identifier: MIT OR Apache-2.0
//! The little of ACPI's table format and machine language that describes this machine.
//!
//! The crate for this, acpi_tables, does not compile with Rust 1.85; what is needed of it is small. Numbers in comments are sections
//! of the ACPI specification, 6.5.

/// A system description table under construction (5.2.6).
pub(super) struct Table(Vec<u8>);

impl Table {
    /// `bytes` long, zero behind its header.
    pub(super) fn new(signature: [u8; 4], bytes: usize, revision: u8) -> Self {
        let mut table = Vec::with_capacity(bytes);
        table.extend_from_slice(&signature);
        table.extend_from_slice(&[0; 4]); // the length, by `finish`
        table.extend_from_slice(&[revision, 0]);
        table.extend_from_slice(b"HMMTB HMMTBVMM");
        table.extend_from_slice(&1_u32.to_le_bytes());
        table.extend_from_slice(b"HMTB");
        table.extend_from_slice(&1_u32.to_le_bytes());
        table.resize(bytes.max(36), 0);
        Self(table)
    }

    /// Puts bytes at an offset; the table grows if it must.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        if end > self.0.len() {
            self.0.resize(end, 0);
        }
        self.0[at..end].copy_from_slice(bytes);
    }

    /// Appends bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Length and check sum are filled in.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.put(4, &length.to_le_bytes());
        self.0[9] = 0;
        self.0[9] = check_sum(&self.0);
        self.0
    }
}

/// What makes the sum of all bytes zero.
pub(super) fn check_sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// The root pointer (5.2.5.3).
pub(super) fn root_pointer(root: u64) -> Vec<u8> {
    let mut bytes = b"RSD PTR \0HMMTB \x02".to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&36_u32.to_le_bytes());
    bytes.extend_from_slice(&root.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes[8] = check_sum(&bytes[..20]);
    bytes[32] = check_sum(&bytes);
    bytes
}

/// A register of one byte in the port space (5.2.3.2).
pub(super) fn port(number: u16) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&[1, 8, 0, 1]);
    bytes[4..6].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// A length and what it is the length of, itself included (20.2.4).
fn package(body: &[u8]) -> Vec<u8> {
    let mut bytes = match body.len() {
        length @ 0..=62 => vec![length as u8 + 1],
        length @ 63..=4093 => vec![1 << 6 | (length + 2) as u8 & 15, ((length + 2) >> 4) as u8],
        length => {
            vec![2 << 6 | (length + 3) as u8 & 15, ((length + 3) >> 4) as u8, ((length + 3) >> 12) as u8]
        }
    };
    bytes.extend_from_slice(body);
    bytes
}

/// A whole number (20.2.3).
pub(super) fn number(number: u32) -> Vec<u8> {
    match number {
        0 | 1 => vec![number as u8],
        2..=0xff => vec![0x0a, number as u8],
        0x100..=0xffff => [&[0x0b][..], &(number as u16).to_le_bytes()].concat(),
        _ => [&[0x0c][..], &number.to_le_bytes()].concat(),
    }
}

/// A string (20.2.3).
pub(super) fn string(text: &str) -> Vec<u8> {
    [&[0x0d], text.as_bytes(), &[0]].concat()
}

/// A name for hardware, three letters and four hexadecimal digits, packed into a number (19.3.4).
pub(super) fn eisa(name: [u8; 7]) -> Vec<u8> {
    let letters = name[..3].iter().fold(0_u32, |bits, letter| bits << 5 | u32::from(letter & 0x1f));
    let digits =
        name[3..].iter().fold(0_u32, |bits, digit| bits << 4 | char::from(*digit).to_digit(16).unwrap_or(0));
    [&[0x0c][..], &(letters << 16 | digits).to_be_bytes()].concat()
}

/// A name with its value (20.2.5.1).
pub(super) fn name(name: [u8; 4], value: &[u8]) -> Vec<u8> {
    [&[0x08], &name[..], value].concat()
}

/// A list of values (20.2.5.4).
pub(super) fn list(values: &[Vec<u8>]) -> Vec<u8> {
    let body = [&[values.len() as u8][..], &values.concat()].concat();
    [&[0x12][..], &package(&body)].concat()
}

/// A device below the system bus, with its names (20.2.5.2).
pub(super) fn device(called: [u8; 4], names: &[Vec<u8>]) -> Vec<u8> {
    let body = [b"\x2e_SB_", &called[..], &names.concat()].concat();
    [&[0x5b, 0x82][..], &package(&body)].concat()
}

/// A device inside of another one, with its names.
pub(super) fn inner_device(called: [u8; 4], names: &[Vec<u8>]) -> Vec<u8> {
    let body = [&called[..], &names.concat()].concat();
    [&[0x5b, 0x82][..], &package(&body)].concat()
}

/// A method with so many arguments (20.2.5.2).
pub(super) fn method(called: [u8; 4], arguments: u8, body: &[u8]) -> Vec<u8> {
    let body = [&called[..], &[arguments], body].concat();
    [&[0x14][..], &package(&body)].concat()
}

/// Tells whoever drives a device below the system bus that something has happened to it (20.2.5.3).
pub(super) fn notify(device: [u8; 4], what: u32) -> Vec<u8> {
    [&b"\x86\x5c\x2e_SB_"[..], &device, &number(what)].concat()
}

/// Resources, with the tag that ends them (6.4).
pub(super) fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    let bytes = [&descriptors.concat()[..], &[0x79, 0]].concat();
    let body = [number(bytes.len() as u32), bytes].concat();
    [&[0x11][..], &package(&body)].concat()
}

/// Ports (6.4.2.5).
pub(super) fn ports(first: u16, align: u8, count: u8) -> Vec<u8> {
    let at = first.to_le_bytes();
    vec![0x47, 1, at[0], at[1], at[0], at[1], align, count]
}

/// A level-triggered or edge-triggered interrupt, active high, not shared, that this device consumes (6.4.3.6).
pub(super) fn edge_interrupt(line: u32) -> Vec<u8> {
    [&[0x89, 6, 0, 0b11, 1][..], &line.to_le_bytes()].concat()
}

/// Memory that is read and written, at a fixed place (6.4.3.4).
pub(super) fn fixed_memory(at: u32, bytes: u32) -> Vec<u8> {
    [&[0x86, 9, 0, 1][..], &at.to_le_bytes(), &bytes.to_le_bytes()].concat()
}

/// A range that a bridge hands on: kind (0 memory, 2 buses), flags of that kind, first and last, in fields of this many bytes
/// (6.4.3.5).
pub(super) fn window(field: usize, kind: u8, specific: u8, first: u64, last: u64) -> Vec<u8> {
    let tag = match field {
        2 => 0x88,
        4 => 0x87,
        _ => 0x8a,
    };
    let mut bytes = vec![tag, 3 + 5 * field as u8, 0, kind, 0b1100, specific];
    // Granularity, first, last, translation, length.
    for value in [0, first, last, 0, last - first + 1] {
        bytes.extend_from_slice(&value.to_le_bytes()[..field]);
    }
    bytes
}
