// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mutants`: broken drivers and correct ones are told apart, each in a guest of its own.

use serde_json::Value;

use crate::support::{Finished, binary, machine, plain, repository};

fn lines(finished: &Finished) -> Vec<Value> {
    finished.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

#[test]
fn broken_drivers_are_killed_by_the_rule_that_they_name() {
    let _one = machine();
    let names = ["release-idle-only", "last-page"];
    let finished = plain(binary().args(["mutants", "--json"]).args(names));
    finished.expect_status(0);
    let lines = lines(&finished);
    assert_eq!(lines.len(), names.len(), "{}", finished.stdout);
    for (line, name) in lines.iter().zip(names) {
        assert_eq!((&line["mutant"], &line["outcome"]), (&name.into(), &"killed".into()), "{line}");
        assert_eq!(line["as_expected"], true, "{line}");
        assert!(line["expected"].is_string() && line["seconds"].as_f64().is_some_and(|s| s > 0.0), "{line}");
        assert!(line["replay"].as_str().is_some_and(|replay| replay.contains(name)), "{line}");
    }
}

/// Of a folder of somebody's: one without a head, one that names a rule which is not it, one that cannot be compiled.
#[test]
fn a_folder_of_other_peoples_patches_is_tried() {
    let _one = machine();
    let folder = tempfile::tempdir().unwrap();
    let patch = |name: &str| std::fs::read_to_string(repository().join("guest/mutants").join(name)).unwrap();
    let whole = patch("unbind-first.patch");
    let bare = &whole[whole.find("--- a/").unwrap()..];
    std::fs::write(folder.path().join("bare.patch"), bare).unwrap();
    std::fs::write(folder.path().join("wrong-rule.patch"), format!("About.\nRule: hang/livelock\n{bare}"))
        .unwrap();
    std::fs::write(folder.path().join("no-c.patch"), bare.replace("vgpu_table_return_all", "nonsense_all"))
        .unwrap();
    let finished = plain(binary().args(["mutants", "--json", "--dir"]).arg(folder.path()));
    finished.expect_status(1);
    let lines = lines(&finished);
    let line = |name: &str| lines.iter().find(|line| line["mutant"] == name).expect(name);
    assert_eq!((&line("bare")["outcome"], &line("bare")["as_expected"]), (&"killed".into(), &true.into()));
    assert_eq!(line("bare")["expected"], Value::Null);
    let wrong = line("wrong-rule");
    assert_eq!((&wrong["outcome"], &wrong["as_expected"]), (&"killed".into(), &false.into()), "{wrong}");
    let broken = line("no-c");
    assert_eq!(broken["outcome"], "error", "{broken}");
    assert!(broken["detail"].as_str().is_some_and(|why| !why.is_empty()), "{broken}");
}

#[test]
fn correct_drivers_are_not_accused() {
    let _one = machine();
    let finished = plain(binary().args(["mutants", "--benign", "check-twice"]));
    finished.expect_status(0).expect_said("clean").expect_said("1 of 1 clean, 0 accused");
}
