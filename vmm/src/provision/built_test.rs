// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;

#[test]
fn kbuilds_lines_name_files() {
    assert_eq!(file("  CC      mm/hmm.o"), Some("mm/hmm.o"));
    assert_eq!(file("  CC [M]  lib/test_hmm.o"), Some("lib/test_hmm.o"));
    assert_eq!(file("  LD      vmlinux"), Some("vmlinux"));
    for other in [
        "make[1]: Entering directory '/tmp'",
        "  Building modules, stage 2.",
        "mm/hmm.c:1: error: x",
        "  ",
        "",
    ] {
        assert_eq!(file(other), None, "{other:?}");
    }
}
