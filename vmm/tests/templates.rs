// SPDX-License-Identifier: MIT OR Apache-2.0
//! The CI templates are valid: well-formed, complete, and every name in them means something. `ci/test` holds them against the
//! forges' own schemas as well, where it can get those.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use yaml_rust2::{Yaml, YamlLoader};

fn file(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci").join(name)).unwrap()
}

fn parse(text: &str) -> Yaml {
    let mut documents = YamlLoader::load_from_str(text).unwrap();
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

/// The words that follow `prefix` in the text.
fn words_after(text: &str, prefix: &str) -> BTreeSet<String> {
    let word = |rest: &str| -> String {
        rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-' || *c == '_').collect()
    };
    text.split(prefix).skip(1).map(word).collect()
}

/// Whether a shell takes the text as a script.
fn is_shell(script: &str) -> bool {
    Command::new("sh").args(["-n", "-c", script]).stderr(Stdio::null()).status().unwrap().success()
}

/// The options that `ci/job` knows: the patterns of its `case`.
fn job_options() -> BTreeSet<String> {
    let known = words_after(&file("job"), "\t--");
    assert!(known.contains("accel") && known.contains("seeds"), "{known:?}");
    known
}

/// Checks a script that calls `ci/job`: it is shell, and each option before `--` is one of the job's.
fn check_job_call(script: &str) {
    assert!(is_shell(script), "no shell script:\n{script}");
    let call = script.split("ci/job").nth(1).unwrap();
    let ours = call.split(" -- ").next().unwrap();
    let given = words_after(ours, " --");
    assert!(!given.is_empty() && given.is_subset(&job_options()), "{given:?}");
}

#[test]
fn the_github_workflow_is_whole() {
    let text = file("github/hmm-testbench.yml");
    let workflow = parse(&text);
    // In YAML 1.1 `on` is a truth value; this parser, as the forge's, keeps the word.
    let inputs = workflow["on"]["workflow_call"]["inputs"].as_hash().unwrap();
    let declared: BTreeSet<String> = inputs.keys().map(|key| key.as_str().unwrap().to_owned()).collect();
    for (name, input) in inputs {
        assert!(input["description"].as_str().is_some(), "{name:?}");
        assert!(matches!(input["type"].as_str(), Some("string" | "number" | "boolean")), "{name:?}");
        let required = input["required"].as_bool() == Some(true);
        assert!(required == input["default"].is_badvalue(), "{name:?}: either required or with a default");
    }
    assert_eq!(declared, words_after(&text, "inputs."), "declared, and used");
    assert_eq!(inputs[&Yaml::String("accel".into())]["default"].as_str(), Some("kvm"), "no silent fall back");

    let job = &workflow["jobs"]["hmm-testbench"];
    assert!(!job["timeout-minutes"].is_badvalue());
    let steps = job["steps"].as_vec().unwrap();
    let ids: BTreeSet<String> =
        steps.iter().filter_map(|step| step["id"].as_str()).map(str::to_owned).collect();
    assert_eq!(ids, words_after(&text, "steps."), "step ids, and uses of them");
    let mut calls = 0;
    for step in steps {
        match (step["uses"].as_str(), step["run"].as_str()) {
            (Some(action), None) => {
                assert!(action.split_once('@').is_some_and(|(_, v)| !v.is_empty()), "{action}")
            }
            (None, Some(script)) => {
                assert!(!script.contains("${{"), "an input in a script is read as shell:\n{script}");
                assert!(is_shell(script), "{script}");
                if script.contains("ci/job") {
                    check_job_call(script);
                    calls += 1;
                    let given = step["env"].as_hash().unwrap();
                    for name in ["ACCEL", "KERNEL", "SEEDS", "ARGUMENTS"] {
                        assert!(given.contains_key(&Yaml::String(name.into())), "{name}");
                        assert!(script.contains(&format!("${name}")), "{name}");
                    }
                }
            }
            _ => panic!("a step either uses or runs: {step:?}"),
        }
    }
    assert_eq!(calls, 1);
}

#[test]
fn the_gitlab_template_is_whole() {
    let text = file("gitlab/hmm-testbench.yml");
    let template = parse(&text);
    let job = &template[".hmm-testbench"];
    let mut declared: BTreeSet<String> =
        job["variables"].as_hash().unwrap().keys().map(|key| key.as_str().unwrap().to_owned()).collect();
    assert_eq!(job["variables"]["HMM_TESTBENCH_ACCEL"].as_str(), Some("kvm"), "no silent fall back");
    // The one that has no default: who extends the job gives it.
    declared.insert("HMM_TESTBENCH_URL".into());
    for used in words_after(&text, "$HMM_TESTBENCH_") {
        assert!(declared.contains(&format!("HMM_TESTBENCH_{used}")), "{used} has no default");
    }
    let lines: Vec<&str> = ["before_script", "script"]
        .iter()
        .flat_map(|part| job[*part].as_vec().unwrap())
        .map(|line| line.as_str().unwrap())
        .collect();
    check_job_call(&lines.join("\n"));
    assert!(job["artifacts"]["reports"]["junit"].as_str().unwrap().ends_with("junit.xml"));
    assert_eq!(job["artifacts"]["when"].as_str(), Some("always"));
}

#[test]
fn the_job_refuses_what_it_does_not_know() {
    let job = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/job");
    for (arguments, words) in [
        (&["--frobnicate"][..], "unknown argument"),
        (&["--accel", "hardware"], "kvm, tcg or any"),
        (&["--seeds", "0"], "whole number"),
        (&["--seeds"], "lacks its value"),
    ] {
        let output = Command::new(&job).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(words) && said.contains("ci/job [--accel"), "{arguments:?}: {said}");
    }
}
