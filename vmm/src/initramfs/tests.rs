// SPDX-License-Identifier: MIT OR Apache-2.0

use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use super::*;

/// Name, mode, links, device, contents.
type Parsed = (String, u32, u32, (u32, u32), Vec<u8>);

fn parse(mut bytes: &[u8]) -> Vec<Parsed> {
    let mut entries = Vec::new();
    let whole = bytes.len();
    loop {
        assert_eq!(&bytes[..6], b"070701");
        let field = |n: usize| {
            u32::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap(), 16).unwrap()
        };
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
        assert_eq!(bytes[110 + name_size - 1], 0);
        assert_eq!(field(5), 0, "no time of this host");
        let data = (110 + name_size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert_eq!(whole % 512, 0);
            return entries;
        }
        entries.push((name, field(1), field(4), (field(9), field(10)), bytes[data..data + size].to_vec()));
        bytes = &bytes[(data + size).next_multiple_of(4)..];
    }
}

fn sample() -> Initramfs {
    let mut fs = Initramfs::new();
    fs.file("/init", 0o755, *b"#!").unwrap();
    fs.file("testbench/plan.json", 0o644, *b"{}x").unwrap();
    fs.node("/dev/console", 0o600, 5, 1).unwrap();
    fs.symlink("/bin/sh", "busybox").unwrap();
    fs.dir("/tmp", 0o1777).unwrap();
    fs
}

#[test]
fn entries_come_back_in_an_order_the_kernel_can_use() {
    let parsed = parse(&sample().finish().unwrap());
    let names: Vec<&str> = parsed.iter().map(|entry| entry.0.as_str()).collect();
    assert_eq!(
        names,
        ["bin", "bin/sh", "dev", "dev/console", "init", "testbench", "testbench/plan.json", "tmp"]
    );
    assert_eq!(parsed[1], ("bin/sh".into(), 0o120_777, 1, (0, 0), b"busybox".to_vec()));
    assert_eq!(parsed[3], ("dev/console".into(), 0o020_600, 1, (5, 1), vec![]));
    assert_eq!(parsed[6], ("testbench/plan.json".into(), 0o100_644, 1, (0, 0), b"{}x".to_vec()));
    assert_eq!(parsed[7].1, 0o041_777);
    assert_eq!(parsed[7].2, 2);
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    assert_eq!(sample().finish().unwrap(), sample().finish().unwrap());
}

#[test]
fn paths_that_lead_out_or_clash_are_refused() {
    let mut fs = sample();
    for path in ["", "/", "a/../b", "x\0y"] {
        assert!(fs.file(path, 0o644, *b"").is_err(), "{path:?}");
    }
    assert!(fs.file("/init/below", 0o644, *b"").is_err());
    assert!(fs.file("/testbench", 0o644, *b"").is_err());
    assert!(fs.dir("/init", 0o755).is_err());
}

#[test]
fn what_is_put_below_a_link_lands_where_it_leads() {
    let mut fs = Initramfs::new();
    fs.symlink("/lib", "usr/lib").unwrap();
    fs.file("/lib/x/y", 0o644, *b"1").unwrap();
    let names: Vec<String> = parse(&fs.finish().unwrap()).into_iter().map(|entry| entry.0).collect();
    assert_eq!(names, ["lib", "usr", "usr/lib", "usr/lib/x", "usr/lib/x/y"]);
    fs.symlink("/loop", "loop/loop").unwrap();
    assert!(fs.file("/loop/x", 0o644, *b"").is_err());
    fs.symlink("/a", "/b").unwrap();
    fs.symlink("/b", "/a").unwrap();
    assert!(fs.file("/a/x", 0o644, *b"").is_err());
}

#[test]
fn a_host_directory_keeps_modes_and_links() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::write(dir.path().join("sub/file"), "text").unwrap();
    symlink("sub/file", dir.path().join("link")).unwrap();
    let mut fs = Initramfs::new();
    fs.add_host(dir.path(), "/opt/x").unwrap();
    let parsed = parse(&fs.finish().unwrap());
    let names: Vec<&str> = parsed.iter().map(|entry| entry.0.as_str()).collect();
    assert_eq!(names, ["opt", "opt/x", "opt/x/link", "opt/x/sub", "opt/x/sub/file"]);
    assert_eq!(parsed[2].4, b"sub/file");
    assert!(fs.add_host(std::path::Path::new("/nonexistent/x"), "/x").is_err());
    assert!(fs.add_host(std::path::Path::new("/dev/null"), "/x").is_err());
}

#[test]
fn a_dynamic_program_brings_its_loader_and_libraries() {
    let mut fs = Initramfs::new();
    // sh is dynamic on every Debian and Ubuntu.
    fs.add_host(std::path::Path::new("/bin/sh"), "/bin/sh").unwrap();
    assert!(fs.contains("/lib64/ld-linux-x86-64.so.2"));
    assert!(
        parse(&fs.finish().unwrap())
            .iter()
            .any(|entry| entry.0.ends_with("libc.so.6") && entry.4.len() > 100_000)
    );
}

#[test]
fn arguments_of_add() {
    assert_eq!(parse_add("x:/y").unwrap(), ("x".into(), "/y".into()));
    assert_eq!(parse_add("/bin/").unwrap().1, "/add/bin");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mytest-1.2"), "").unwrap();
    let (link, dangling) = (dir.path().join("mytest"), dir.path().join("dangling"));
    symlink("mytest-1.2", &link).unwrap();
    symlink("nothing", &dangling).unwrap();
    assert_eq!(parse_add(link.to_str().unwrap()).unwrap().1, "/add/mytest", "a link goes by its own name");
    assert!(parse_add(dangling.to_str().unwrap()).is_err());
    let above = dir.path().join("sub");
    std::fs::create_dir(&above).unwrap();
    let name = dir.path().canonicalize().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(parse_add(above.join("..").to_str().unwrap()).unwrap().1, format!("/add/{name}"));
    assert!(parse_add("x:y").is_err());
    assert!(parse_add("no such file").is_err());
}

#[test]
fn cpio_reads_it() {
    let Ok(mut cpio) = Command::new("cpio")
        .arg("-t")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
    else {
        return; // not everywhere installed; our own parser has the last word
    };
    cpio.stdin.take().unwrap().write_all(&sample().finish().unwrap()).unwrap();
    let output = cpio.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("testbench/plan.json\n"));
}
