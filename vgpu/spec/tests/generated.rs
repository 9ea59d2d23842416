// SPDX-License-Identifier: MIT OR Apache-2.0
//! The generated files in the tree are what the tables generate, and the tables make sense.
use vgpu_spec::regs::{Access, Register, gpu, witness};

const MAKE: &str = "run `cargo run -p vgpu-spec --bin spec-gen` and commit the result";

#[test]
fn c_header_is_current() {
    assert_eq!(
        include_str!("../../../guest/include/hmm_vgpu_regs.h"),
        vgpu_spec::header::c_header(),
        "{MAKE}"
    );
}

#[test]
fn register_page_is_current() {
    assert_eq!(include_str!("../../../docs/registers.md"), vgpu_spec::docs::registers_md(), "{MAKE}");
}

fn check(registers: &[Register], limit: u64) {
    let mut end = 0;
    for r in registers {
        assert_eq!(r.offset % 4, 0, "{}", r.name);
        assert!(r.offset >= end, "{} overlaps its predecessor", r.name);
        end = r.offset + 4 * r.count;
        assert!(u64::from(end) <= limit, "{} ends outside the BAR", r.name);
        if let Access::WriteOneToClear(mask) | Access::ReadWrite(mask) = r.access {
            assert_ne!(mask, 0, "{}", r.name);
        }
        assert!(!r.doc.trim().is_empty(), "{}", r.name);
    }
}

#[test]
fn registers_are_in_order_and_do_not_overlap() {
    check(gpu::REGISTERS, u64::from(gpu::WINDOW));
    check(witness::REGISTERS, witness::BAR_BYTES);
}
