// SPDX-License-Identifier: MIT OR Apache-2.0
//! The CPU's page tables, as they lie in the guest's memory: x86-64, four or five levels.
//!
//! They are read while the guest changes them, without any of its locks. An entry is one aligned word, so what is read is
//! always something that stood there; but a table may have been freed and used for something else between two steps of a
//! walk. Who finds something wrong therefore walks again ([`Space::settled`]) before it accuses anybody.

mod entry;
mod walk;

pub use entry::{Format, Kind, Page};
pub use walk::{Hint, Space};
