// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtual GPU's programming interface, apart from any implementation of it.
//!
//! Everything that a driver and the device must agree on is declared here once: the register table ([`regs`]), commands
//! ([`command`]), jobs ([`job`]), page-table entries ([`pte`]), the fault buffer ([`fault`]), handles ([`handle`]), the
//! witness's records ([`witness`]) and gates ([`gate`]). [`header`] turns it into the C header that guest modules include and [`docs`] into
//! docs/registers.md; tests compare both files with what is generated, so they cannot drift.
#![forbid(unsafe_code)]

pub mod command;
pub mod docs;
pub mod fault;
pub mod gate;
pub mod handle;
pub mod header;
pub mod job;
pub mod pte;
pub mod range;
pub mod regs;
pub mod uapi;
pub mod witness;

/// PCI vendor id of both functions. 0x1234 is not assigned to anybody by the PCI-SIG and is what QEMU's own teaching
/// device uses.
pub const PCI_VENDOR_ID: u16 = 0x1234;
/// PCI device id of the virtual GPU.
pub const PCI_DEVICE_GPU: u16 = 0x4d47;
/// PCI device id of the witness function.
pub const PCI_DEVICE_WITNESS: u16 = 0x4d57;

/// Declares plain numeric constants in a module and a list of them for the generators.
///
/// `CONSTANTS` holds (name, value, doc line) in order of declaration; [`crate::header`] prefixes the names.
#[macro_export]
#[doc(hidden)]
macro_rules! constants {
    ($($(#[doc = $doc:literal])+ $name:ident: $ty:ty = $value:expr;)+) => {
        $($(#[doc = $doc])+ pub const $name: $ty = $value;)+
        /// Name, value and doc line of every constant above.
        pub const CONSTANTS: &[(&str, u64, &str)] = &[$((stringify!($name), $name as u64, concat!($($doc),+))),+];
    };
}
