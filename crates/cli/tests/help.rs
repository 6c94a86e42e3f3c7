//! What every command owes its reader: help with an example, a manual page, completion.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{Done, strake};

fn run(args: &[&str]) -> Done {
    common::done(strake().args(args).output().unwrap())
}

/// Every command of the table, with the ones below it.
fn commands(of: &clap::Command, path: &[String], all: &mut Vec<Vec<String>>) {
    for sub in of.get_subcommands() {
        let mut path = path.to_vec();
        path.push(sub.get_name().to_owned());
        all.push(path.clone());
        commands(sub, &path, all);
    }
}

fn all() -> Vec<Vec<String>> {
    let mut all = Vec::new();
    commands(&strake_cli::app::command(), &[], &mut all);
    all
}

#[test]
fn the_arguments_are_sound() {
    strake_cli::app::command().debug_assert();
}

#[test]
fn the_commands_are_those_of_the_design() {
    let names: Vec<String> = all().iter().map(|path| path.join(" ")).collect();
    assert_eq!(
        names,
        [
            "doctor",
            "create",
            "run",
            "start",
            "stop",
            "restart",
            "upgrade",
            "rm",
            "ps",
            "show",
            "set",
            "label",
            "profile",
            "profile apply",
            "profile plan",
            "profile rm",
            "profile ls",
            "profile show",
            "profile effective",
            "profile fields",
            "console",
            "logs",
            "datastore",
            "datastore add",
            "datastore ls",
            "datastore rm",
            "disk",
            "disk migrate",
            "disk snapshot",
            "disk tree",
            "disk revert",
            "disk delete-snapshot",
            "disk consolidate",
            "export",
            "export ls",
            "export show",
            "export start",
            "export rm",
            "jobs",
            "jobs ls",
            "jobs show",
            "jobs cancel",
            "jobs pause",
            "jobs resume",
            "jobs set",
            "jobs wait",
            "observations",
            "completion",
            "man",
        ]
    );
}

#[test]
fn every_command_has_help_with_an_example_and_json() {
    for path in all() {
        let mut args: Vec<&str> = path.iter().map(String::as_str).collect();
        args.push("--help");
        let done = run(&args).ok();
        let name = path.join(" ");
        assert!(done.out.contains("Example"), "{name}: {}", done.out);
        assert!(
            done.out.contains(&format!("strake {name}")),
            "{name}: {}",
            done.out
        );
        assert!(done.out.contains("--json"), "{name}: {}", done.out);
        assert!(
            done.out.lines().all(|line| line.chars().count() <= 110),
            "{name}"
        );
    }
}

#[test]
fn the_exit_codes_are_in_the_help() {
    let done = run(&["--help"]).ok();
    for line in [
        "  0    it was done",
        "  2    the command line",
        "  3    the daemon",
        "  130  ",
    ] {
        assert!(done.out.contains(line), "{line}");
    }
}

#[test]
fn usage_errors_are_exit_code_2() {
    for args in [
        &["nonsense"][..],
        &[],
        &["run"],
        &["run", "a.raw", "--cpus", "17"],
        &["run", "a.raw", "--cpus", "0"],
        &["run", "a.raw", "--memory", "much"],
        &["run", "a.raw", "-f", "b.toml"],
        &["run", "a.raw", "--initrd", "i"],
        &["create", "a"],
        &["disk", "migrate", "a", "b"],
        &["disk", "migrate", "a", "b", "--to", "c", "--rate", "0"],
        &[
            "disk", "migrate", "a", "b", "--to", "c", "--detach", "--wait",
        ],
        &["observations", "--since", "-1"],
    ] {
        let done = run(args);
        assert_eq!(done.code, Some(2), "{args:?}: {done:?}");
        assert!(!done.err.is_empty(), "{args:?}");
    }
}

#[test]
fn every_command_has_a_manual_page() {
    let root = run(&["man"]).ok();
    assert!(root.out.contains(".TH strake 1"), "{}", root.out);
    assert!(root.out.contains("Exit codes"), "{}", root.out);
    for path in all() {
        let mut args = vec!["man"];
        args.extend(path.iter().map(String::as_str));
        let done = run(&args).ok();
        let title = format!(".TH strake-{} 1", path.join("-"));
        assert!(done.out.contains(&title), "{title}: {}", done.out);
    }
    let dir = tempfile::tempdir().unwrap();
    run(&["man", "--dir", dir.path().to_str().unwrap()]).ok();
    assert!(dir.path().join("strake-disk-migrate.1").exists());
    let done = run(&["man", "no", "such"]);
    assert_eq!(done.code, Some(1));
    assert!(done.err.contains("cli.no-such-command"), "{}", done.err);
}

#[test]
fn every_shell_has_completion() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let done = run(&["completion", shell]).ok();
        assert!(done.out.contains("migrate"), "{shell}");
    }
}

#[test]
fn the_version_is_told() {
    let done = run(&["--version"]).ok();
    assert_eq!(done.out, format!("strake {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn every_command_is_in_the_book() {
    let book = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/src/cli.md");
    let book = std::fs::read_to_string(book).unwrap();
    for path in all() {
        let name = path.join(" ");
        assert!(book.contains(&format!("strake {name}")), "{name}");
    }
    for code in ["| 0 |", "| 1 |", "| 2 |", "| 3 |", "| 130 |", "| 141 |"] {
        assert!(book.contains(code), "{code}");
    }
}
