// SPDX-License-Identifier: MIT OR Apache-2.0
//! docs/registers.md, made from the tables.

use core::fmt::Write as _;

use crate::regs::{Access, Register, gpu, witness};
use crate::{command, fault, gate, job, pte, range, witness as records};

/// The whole page.
#[must_use]
pub fn registers_md() -> String {
    let mut out = String::from(
        "# Registers and formats\n\n<!-- Made by `cargo run -p vgpu-spec --bin spec-gen`; a test compares it. Do not edit. -->\n",
    );
    table(&mut out, "GPU, BAR0", gpu::REGISTERS);
    table(&mut out, "Witness, BAR0", witness::REGISTERS);
    for (title, list) in [
        ("Commands", command::CONSTANTS),
        ("Jobs and completions", job::CONSTANTS),
        ("Page-table entries", pte::CONSTANTS),
        ("Fault entries", fault::CONSTANTS),
        ("Witness records", records::CONSTANTS),
        ("Invalidations in witness records", range::CONSTANTS),
        ("Gates: witness records, and why a task goes on", gate::CONSTANTS),
    ] {
        let _ = write!(out, "\n## {title}\n\n| name | value | meaning |\n|---|---|---|\n");
        for (name, value, doc) in list {
            let _ = writeln!(out, "| `{name}` | {value:#x} | {} |", cell(doc));
        }
    }
    out
}

fn cell(doc: &str) -> String {
    doc.trim().replace('|', "\\|")
}

fn table(out: &mut String, title: &str, registers: &[Register]) {
    let _ =
        write!(out, "\n## {title}\n\n| offset | name | access | reset | meaning |\n|---|---|---|---|---|\n");
    for r in registers {
        let access = match r.access {
            Access::ReadOnly => "RO".to_owned(),
            Access::ReadWrite(u32::MAX) => "RW".to_owned(),
            Access::ReadWrite(mask) => format!("RW {mask:#x}"),
            Access::WriteOneToClear(mask) => format!("W1C {mask:#x}"),
            Access::WriteOnly => "WO".to_owned(),
        };
        let name = if r.count > 1 { format!("{}[{}]", r.name, r.count) } else { r.name.to_owned() };
        let _ =
            writeln!(out, "| {:#06x} | `{name}` | {access} | {:#x} | {} |", r.offset, r.reset, cell(r.doc));
    }
}
