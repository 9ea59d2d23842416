// SPDX-License-Identifier: MIT OR Apache-2.0
//! guest/include/hmm_vgpu_regs.h, made from the tables.

use core::fmt::Write as _;

use crate::regs::{Register, gpu, witness};
use crate::{command, fault, gate, handle, job, pte, range, witness as records};

/// The whole header.
#[must_use]
pub fn c_header() -> String {
    let mut out = String::from(
        "/* SPDX-License-Identifier: GPL-2.0 OR MIT */\n\
         /* Made by `cargo run -p vgpu-spec --bin spec-gen`; a test compares it. Do not edit. */\n\
         #ifndef HMM_VGPU_REGS_H\n#define HMM_VGPU_REGS_H\n\n#include <linux/types.h>\n\n",
    );
    for (name, value) in [
        ("VGPU_PCI_VENDOR", u64::from(crate::PCI_VENDOR_ID)),
        ("VGPU_PCI_DEVICE", u64::from(crate::PCI_DEVICE_GPU)),
        ("WITNESS_PCI_DEVICE", u64::from(crate::PCI_DEVICE_WITNESS)),
    ] {
        let _ = writeln!(out, "#define {name} {value:#x}");
    }
    section(&mut out, "GPU registers (BAR0)", "VGPU_REG_", gpu::REGISTERS);
    for (name, value) in [
        ("BAR_BYTES", gpu::BAR_BYTES),
        ("WINDOW", u64::from(gpu::WINDOW)),
        ("ID_VALUE", u64::from(gpu::ID_VALUE)),
        ("VERSION_VALUE", u64::from(gpu::VERSION_VALUE)),
        ("CTRL_ENABLE", u64::from(gpu::CTRL_ENABLE)),
        ("CTRL_RESET", u64::from(gpu::CTRL_RESET)),
        ("FAULT_OVERFLOW", u64::from(gpu::FAULT_OVERFLOW)),
        ("ERROR_CMD_RING", u64::from(gpu::ERROR_CMD_RING)),
        ("ERROR_FAULT_BUFFER", u64::from(gpu::ERROR_FAULT_BUFFER)),
        ("ERROR_QUEUE", u64::from(gpu::ERROR_QUEUE)),
        ("ERROR_DOORBELL", u64::from(gpu::ERROR_DOORBELL)),
        ("CAP_COHERENT_ATOMICS", u64::from(gpu::CAP_COHERENT_ATOMICS)),
        ("VECTOR_FAULT", u64::from(gpu::VECTOR_FAULT)),
        ("VECTOR_COMPLETION", u64::from(gpu::VECTOR_COMPLETION)),
        ("VECTOR_EVENT", u64::from(gpu::VECTOR_EVENT)),
        ("VECTORS", u64::from(gpu::VECTORS)),
        ("MAX_QUEUES", u64::from(gpu::MAX_QUEUES)),
    ] {
        let _ = writeln!(out, "#define VGPU_{name} {value:#x}");
    }
    section(&mut out, "Witness registers (BAR0)", "WITNESS_REG_", witness::REGISTERS);
    for (name, value) in [
        ("BAR_BYTES", witness::BAR_BYTES),
        ("ID_VALUE", u64::from(witness::ID_VALUE)),
        ("VERSION_VALUE", u64::from(witness::VERSION_VALUE)),
        ("MAX_SLOTS", u64::from(witness::MAX_SLOTS)),
        ("REQUEST_BLOCKED_TASKS", u64::from(witness::REQUEST_BLOCKED_TASKS)),
        ("REQUEST_ALL_CPUS", u64::from(witness::REQUEST_ALL_CPUS)),
        ("REQUEST_PANIC", u64::from(witness::REQUEST_PANIC)),
        ("QUESTION_WORDS", records::QUESTION_WORDS),
        ("QUESTIONS_MOST", records::QUESTIONS_MOST as u64),
        ("QUESTIONS_STAYS", records::QUESTIONS_STAYS),
        ("QUESTIONS_ANSWERED", records::QUESTIONS_ANSWERED),
        ("MAX_MESSAGE", records::MAX_MESSAGE),
        ("GATE_SLOTS", gate::SLOTS as u64),
        ("GATE_SITES", gate::SITES as u64),
        ("GATE_NO_SLOT", gate::NO_SLOT),
    ] {
        let _ = writeln!(out, "#define WITNESS_{name} {value:#x}");
    }
    for (title, prefix, list) in [
        ("Commands", "VGPU_CMD_", command::CONSTANTS),
        ("Jobs and completions", "VGPU_JOB_", job::CONSTANTS),
        ("Page-table entries", "VGPU_PTE_", pte::CONSTANTS),
        ("Faults", "VGPU_FAULT_", fault::CONSTANTS),
        ("Witness records", "WITNESS_REC_", records::CONSTANTS),
        ("Invalidations in witness records", "WITNESS_RANGE_", range::CONSTANTS),
        ("Gates: witness records, and why a task goes on", "WITNESS_GATE_", gate::CONSTANTS),
    ] {
        let _ = write!(out, "\n/* {title} */\n");
        for (name, value, doc) in list {
            let name = name.strip_prefix("JOB_").unwrap_or(name);
            let suffix = if *value > u64::from(u32::MAX) { "ULL" } else { "" };
            let _ = writeln!(out, "/* {} */\n#define {prefix}{name} {value:#x}{suffix}", doc.trim());
        }
    }
    let _ = write!(
        out,
        "\n/* Handles: index in bits 0-23, kind in 24-31, generation in 32-63. */\n\
         #define VGPU_HANDLE_INDEX(h) ((u32)((h) & {:#x}))\n\
         #define VGPU_HANDLE_KIND(h) ((u32)((h) >> 24) & 0xff)\n\
         #define VGPU_HANDLE_GENERATION(h) ((u32)((h) >> 32))\n\
         #define VGPU_PTE_LEVELS 4\n#define VGPU_PTE_ENTRIES {}\n#define VGPU_VA_BITS {}\n#define VGPU_HUGE_SHIFT {}\n",
        handle::Handle::MAX_INDEX,
        pte::ENTRIES,
        pte::VA_BITS,
        pte::HUGE_SHIFT,
    );
    out.push_str(STRUCTS);
    out.push_str("\n#endif\n");
    out
}

/// The memory formats as C structs; the driver's build asserts their sizes.
const STRUCTS: &str = "
/* Memory formats, little endian. */
struct vgpu_cmd {
\t__le16 op;
\t__le16 flags;
\t__le32 status;
\t__le64 ctx;
\t__le64 arg[5];
\t__le64 result;
};

struct vgpu_job {
\t__le16 op;
\t__le16 flags;
\t__le32 reserved;
\t__le64 fence;
\t__le64 dst;
\t__le64 src;
\t__le64 len;
\t__le64 operand[3];
};

struct vgpu_completion {
\t__le64 fence;
\t__le32 status;
\t__le32 sequence;
\t__le64 result;
\t__le64 address;
};

struct vgpu_fault {
\t__le64 fault;
\t__le64 ctx;
\t__le64 va;
\t__le32 access;
\t__le32 reason;
\t__le64 queue;
\t__le64 fence;
\t__le64 bytes;
\t__le32 retries;
\t__le32 reserved;
};

struct witness_record {
\t__le32 kind;
\t__le32 cpu;
\t__le64 mm;
\t__le64 arg[4];
\t__le32 pid;
\t__le32 tgid;
\t__le64 time_ns;
};
";

fn section(out: &mut String, title: &str, prefix: &str, registers: &[Register]) {
    let _ = write!(out, "\n/* {title} */\n");
    for r in registers {
        let _ = writeln!(out, "/* {} */", r.doc.trim());
        if r.count > 1 {
            let _ = writeln!(out, "#define {prefix}{}(n) ({:#x} + 4 * (n))", r.name, r.offset);
        } else {
            let _ = writeln!(out, "#define {prefix}{} {:#x}", r.name, r.offset);
        }
    }
}
