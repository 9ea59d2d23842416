// SPDX-License-Identifier: MIT OR Apache-2.0
use std::process::Command;

use super::*;

/// Two sections, as modules have, a function that is inlined into another, and two of one name that only their sizes tell apart.
const SOURCE: &str = "\
volatile int seen;
static inline __attribute__((always_inline)) void inner(int x) {
	seen = x;
}
__attribute__((noinline)) void outer(int x) {
	inner(x);
}
__attribute__((noinline, section(\".init.text\"))) void begin(void) {
	outer(7);
	seen = 9;
}
int main(void) {
	begin();
	return 0;
}
";

/// What the compiler makes of it: a relocatable file, or a linked one as a kernel is.
fn compiled(linked: bool) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("guest/driver/test.c");
    std::fs::create_dir_all(source.parent().unwrap()).unwrap();
    std::fs::write(&source, SOURCE).unwrap();
    let object = dir.path().join("test.ko");
    let mode: &[&str] = if linked { &["-no-pie"] } else { &["-c"] };
    let done = Command::new("cc")
        .args(["-g", "-O1", "-fcf-protection=none"])
        .args(mode)
        .arg(&source)
        .arg("-o")
        .arg(&object)
        .status();
    assert!(done.unwrap().success());
    (dir, object)
}

fn size(image: &Image, name: &str) -> u64 {
    image.symbols.iter().find(|symbol| symbol.name == name).unwrap().size
}

#[test]
fn places_in_a_module_get_their_lines() {
    let (_dir, object) = compiled(false);
    let image = Image::read(&object).unwrap();
    let (begin, outer) = (size(&image, "begin"), size(&image, "outer"));
    let mut symbols =
        Symbols::new(None, vec![Module::new("toy".into(), object, Some(0xffff_ffff_c020_0000))]);

    // The last instruction of `begin` is a return; the address before it is still of the store.
    let line = format!(" begin+{:#x}/{begin:#x} [toy]", begin - 1);
    assert_eq!(symbols.line(&line), format!("{line} (guest/driver/test.c:10)"));
    // The fault itself: exact, and inlined.
    let line = format!("RIP: 0010:outer+0x0/{outer:#x} [toy 1234abcd]");
    let told = symbols.line(&line).into_owned();
    assert_eq!(told, format!("{line} (guest/driver/test.c:3, in guest/driver/test.c:6)"));
    // Each place of a line gets its own.
    let line = format!("begin+0x1/{begin:#x} [toy] and outer+0x1/{outer:#x} [toy]");
    assert_eq!(symbols.line(&line).matches("test.c:").count(), 3);
    // As the kernel tells of a module that is gone; `outer` is the first in its section.
    let line = "kmemleak:     0xffffffffc0200001";
    assert_eq!(
        symbols.line(line),
        format!("{line} (outer+0x1, guest/driver/test.c:3, in guest/driver/test.c:6 [toy])")
    );
    assert_eq!(symbols.line("0xffffffffc0300001"), "0xffffffffc0300001");
}

#[test]
fn bare_addresses_get_names() {
    let (_dir, object) = compiled(true);
    let mut image = Image::read(&object).unwrap();
    let begin = image.symbols.iter().find(|symbol| symbol.name == "begin").unwrap().address;
    // A kernel is linked where a test program cannot be.
    image.symbols.iter_mut().for_each(|symbol| symbol.address += 0xffff_ffff_8000_0000);
    image.lines = None;
    let mut symbols = Symbols { kernel: Some(File::Read(Some(Box::new(image)))), modules: Vec::new() };
    let line = format!(" 0x{:x}", begin + 0xffff_ffff_8000_0002);
    assert_eq!(symbols.line(&line), format!("{line} (begin+0x2)"));
    for other in ["at addr ffff888001234560", "0xffff888001234560", "0xffffffff00000000", "CR3: 0x1234"] {
        assert_eq!(symbols.line(other), other);
    }
}

#[test]
fn what_is_not_known_stays_as_it_is() {
    let (_dir, object) = compiled(false);
    let mut symbols =
        Symbols::new(Some("/nonexistent".into()), vec![Module::new("toy".into(), object, None)]);
    for line in [
        " vfs_read+0x12/0x34",
        " begin+0x1/0x2 [other]",
        " nothing+0x1/0x2 [toy]",
        " begin+0xfffffffffffffffff/0x2 [toy]",
        " begin+0xffffffffffffffff/0xffffffffffffffff [toy]",
        "x+0x/0x [toy",
        "+0x1/0x2",
        "0x",
        " ? begin+0x1/0x2 [toy]",
        "",
        "\u{e9}+0x1/0x2 \u{e9}0x\u{e9}",
    ] {
        assert_eq!(symbols.line(line), line);
    }
}

#[test]
fn paths_are_shown_as_the_sources_have_them() {
    for (path, told) in [
        ("/tmp/guest/driver/ctx.c", "guest/driver/ctx.c"),
        ("/tmp/build-7-0/guest/include/../include/x.h", "guest/include/../include/x.h"),
        ("/usr/src/linux-headers-7.3.4-hmm-debug/include/linux/kref.h", "include/linux/kref.h"),
        ("/tmp/out/work/src/mm/hmm.c", "mm/hmm.c"),
        (
            "/tmp/out/work/obj/./arch/x86/include/generated/asm/syscalls_64.h",
            "arch/x86/include/generated/asm/syscalls_64.h",
        ),
        ("/home/me/linux/mm/hmm.c", "/home/me/linux/mm/hmm.c"),
        ("./mm/hmm.c", "mm/hmm.c"),
    ] {
        assert_eq!(shown(path), told);
    }
}

#[test]
fn two_functions_of_one_name() {
    let symbol = |address, size| Symbol { address, size, name: "release".into() };
    let by_name = |indices: &[usize]| HashMap::from([("release".to_owned(), indices.to_vec())]);
    let image = |symbols: Vec<Symbol>, indices: &[usize]| Image {
        symbols,
        by_name: by_name(indices),
        lines: None,
        text: None,
    };
    let two = image(vec![symbol(0x1000, 0x90), symbol(0x2000, 0x205)], &[0, 1]);
    assert_eq!(two.address("release", 0x90), Some(0x1000));
    assert_eq!(two.address("release", 0x210), Some(0x2000));
    assert_eq!(two.address("release", 0x400), None);
    let alike = image(vec![symbol(0x1000, 0x90), symbol(0x2000, 0x90)], &[0, 1]);
    assert_eq!(alike.address("release", 0x90), None);
    assert_eq!(image(vec![symbol(0x1000, 0x90)], &[0]).address("release", 0x1000), Some(0x1000));
}

proptest::proptest! {
    #[test]
    fn no_line_and_no_file_makes_it_panic(line in "[a-z0-9x+/ \\[\\]\u{e9}]{0,60}", bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
        let _ = Image::parse(&bytes);
        let _ = Symbols::default().line(&line);
    }

    #[test]
    fn no_damaged_module_makes_it_panic(at in 0usize..6000, value in proptest::num::u8::ANY) {
        static MODULE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut bytes = MODULE.get_or_init(|| { let (_dir, object) = compiled(false); std::fs::read(object).unwrap() }).clone();
        if let Some(byte) = bytes.get_mut(at) {
            *byte = value;
        }
        if let Ok(image) = Image::parse(&bytes) {
            for symbol in &image.symbols {
                let _ = image.lines(symbol.address);
            }
        }
    }
}
