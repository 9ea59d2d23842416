// SPDX-License-Identifier: MIT OR Apache-2.0
//! A virtual GPU with page tables of its own, and the oracle that judges how a driver keeps them.
//!
//! A library: it knows no hypervisor and does no I/O of its own. A machine (the `hmm-testbench` crate has them) shows
//! [`function::Function`]s to a guest, gives them guest memory ([`memory`]) and an interrupt sink, and follows the oracle's
//! verdict ([`oracle`]).
#![deny(unsafe_code)]

pub mod cpu;
pub mod function;
pub mod gates;
pub mod gpu;
pub mod memory;
pub mod oracle;
pub mod pci;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
pub mod witness;
