// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line as scripts see it: what is refused before anything is started, and with which exit status.

#![allow(clippy::unwrap_used)] // The lint's exception for tests does not cover their helpers.

use assert_cmd::Command;

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let cache = tempfile::tempdir().unwrap();
    let output = Command::cargo_bin("hmm-testbench")
        .unwrap()
        .args(arguments)
        // Nothing here may get as far as provisioning.
        .env("HMM_TESTBENCH_CACHE", cache.path())
        .output()
        .unwrap();
    assert!(std::fs::read_dir(cache.path()).unwrap().next().is_none(), "{arguments:?} touched the cache");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn what_is_wrong_is_refused_by_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let file = file.path().to_str().unwrap();
    for (arguments, said) in [
        (&["run", "acces"][..], "there are: access"),
        (&["run", "--cpus", "0"], "--cpus"),
        (&["run", "--memory", "12"], "512M"),
        (&["run", "--duration", "5"], "30s"),
        (&["run", "--seed", "abc"], "--seed"),
        (&["run", "--patch", "/nonexistent.patch"], "/nonexistent.patch"),
        (&["run", "--driver", "/nonexistent.ko"], "/nonexistent.ko"),
        (&["run", "--driver", "/"], "not a regular file"),
        (&["run", "--patch", "/"], "not a regular file"),
        (&["run", "--add", "/nonexistent:/x"], "/nonexistent"),
        (&["run", "--add", "/etc/hosts", "--add", "/etc/passwd:/add/hosts"], "two are to be /add/hosts"),
        (&["run", "--add", "/dev/null"], "neither a file nor a folder"),
        // Nothing is fetched or built to find these out.
        (&["run", "--kernel", "no-such-kernel"], "backports"),
        (&["run", "--kernel", "/"], "not a built kernel tree"),
        (&["run", "--driver", file], "not a kernel module"),
        (&["run", "--patch", file], "not a patch"),
        (&["provision", "--kernel", "no-such-kernel"], "backports"),
        (&["provision", "--kernel", "/etc/passwd"], "not an x86-64 Linux kernel"),
        (&["run", "--exec", " "], "--exec"),
        (&["run", "--out", file], "not a folder"),
        (&["run", "--format", "xml"], "human"),
        (&["run", "--backend", "list"], "mirror"),
        (&["run", "--mirror-policy", "srcu"], "--backend mirror"),
        (&["run", "--backend", "mirror", "--mirror-policy", "none"], "drop-lock"),
        (&["run", "--trace-bytes", "5K"], "1M"),
        (&["run", "--nested", "--trace-bytes", "2G"], "--trace-bytes"),
        (&["check", "/nonexistent"], "/nonexistent"),
        (&["check", file], "no trace"),
        (&["check"], "TRACE"),
        (&["run", "--allow", "/nonexistent"], "/nonexistent"),
        (&["run", "--allow", file], "[[allow]]"),
        (&["check", "--allow", file, "/nonexistent"], "[[allow]]"),
        (&["run", "--shell"], "terminal"),
        (&["run", "--shell", "--format", "jsonl"], "terminal"),
        (&["list", "everything"], "workloads"),
        (&["no-such-command"], "no-such-command"),
        (&[], "Usage"),
    ] {
        let (status, _, stderr) = run(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(said), "{arguments:?}: {stderr}");
    }
}

#[test]
fn what_this_version_lacks_is_said() {
    for arguments in [
        &["run", "--inject", "x"][..],
        &["run", "--format", "ktap"],
        &["run", "--format", "junit"],
        &["campaign", "run"],
    ] {
        let (status, _, stderr) = run(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains("not in this version"), "{arguments:?}: {stderr}");
    }
}

#[test]
fn what_contradicts_nested_is_refused() {
    for (arguments, said) in [
        (&["run", "--machine", "qemu", "--vfio", "0000:00:00.0"][..], "--machine kvm"),
        (&["run", "--machine", "kvm", "--vfio", "gpu"], "--nested"),
        (&["run", "--machine", "kvm", "--vfio", "01:00"], "no PCI address"),
        (&["run", "--machine", "kvm", "--nested", "--vfio", "0000:00:04.0"], "edu"),
        (&["run", "--nested", "--accel", "tcg"][..], "contradicts"),
        (&["run", "--machine", "kvm", "--accel", "tcg"], "--machine kvm"),
        (&["run", "--nested", "--shell"], "--exec"),
        (&["run", "--outer-cpus", "2"], "--nested"),
        (&["run", "--outer-kernel", "built:host"], "--nested"),
        (&["run", "--kernel", "built:host"], "--outer-kernel built:host"),
        (&["run", "--nested", "--outer-kernel", "nonsense"], "no kernel is named"),
        (&["nested-inside"], "run --nested"),
    ] {
        let (status, _, stderr) = run(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(said), "{arguments:?}: {stderr}");
    }
}

#[test]
fn lists() {
    for (kind, member) in [("workloads", "stress"), ("rules", "release/late"), ("kernels", "backports")] {
        let (status, text, _) = run(&["list", kind]);
        assert_eq!(status, Some(0));
        assert!(text.contains(member), "{kind}: {text}");
        let (_, json, _) = run(&["list", kind, "--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert!(json.as_array().unwrap().iter().any(|entry| entry["name"] == member), "{json}");
    }
    let (_, text, _) = run(&["list", "mutants"]);
    assert!(
        text.lines().any(|line| line.starts_with("lost-interrupt ") && line.contains("hang/lost-interrupt"))
    );
    let (status, json, _) = run(&["list", "mutants", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(status, Some(0));
    assert!(
        json.as_array().unwrap().iter().all(|entry| entry["rule"].is_string() && entry["path"].is_string())
    );
    for (kind, member) in [("scenarios", "fault-under-invalidate"), ("gates", "hmm_range_fault")] {
        let (status, text, _) = run(&["list", kind]);
        assert!(status == Some(0) && text.contains(member), "{kind}: {text}");
    }
    let (status, json, stderr) = run(&["list", "inject", "--json"]);
    assert_eq!((status, json.trim()), (Some(0), "[]"));
    assert!(stderr.contains("none in this version"));
}

#[test]
fn a_failure_is_an_object_in_json_lines() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (status, stdout, _) = run(&["run", "--format", "jsonl", "--out", file.to_str().unwrap()]);
    assert_eq!(status, Some(2));
    for line in stdout.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(value["event"].is_string(), "{line}");
    }
    assert!(stdout.contains("not a folder"));
}

#[test]
fn a_qemu_that_was_named_and_is_none_is_seen_by_doctor_too() {
    for arguments in [&["doctor"][..], &["run", "access"]] {
        let cache = tempfile::tempdir().unwrap();
        let output = Command::cargo_bin("hmm-testbench")
            .unwrap()
            .args(arguments)
            .env("HMM_TESTBENCH_CACHE", cache.path())
            .env("HMM_TESTBENCH_QEMU", "/bin/true")
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        assert_eq!(output.status.code(), Some(4), "{text}");
        assert!(text.contains("HMM_TESTBENCH_QEMU is /bin/true"), "{text}");
    }
}

#[test]
fn kvm_demanded_where_it_cannot_be_is_the_environments_fault() {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if text.contains("vmx") || text.contains("svm") {
        return; // It might well work here.
    }
    let (status, _, stderr) = run(&["run", "--machine", "kvm"]);
    assert_eq!(status, Some(4), "{stderr}");
    assert!(stderr.contains("--nested"), "{stderr}");
    let (status, stdout, _) = run(&["doctor", "--json"]);
    assert!(matches!(status, Some(0 | 4)));
    let doctor: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(doctor["kvm_can_run_linux"], false);
    let out = tempfile::tempdir().unwrap();
    let (status, _, stderr) = run(&["run", "--accel", "kvm", "--out", out.path().to_str().unwrap()]);
    assert_eq!(status, Some(4), "{stderr}");
    assert!(stderr.contains("--accel tcg"), "{stderr}");
    let results = std::fs::read(out.path().join("results.json")).unwrap();
    let results: serde_json::Value = serde_json::from_slice(&results).unwrap();
    assert_eq!((&results["verdict"], &results["exit_status"]), (&"error".into(), &4.into()));
    assert_eq!(results["error"]["kind"], "environment");
}
