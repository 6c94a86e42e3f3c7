//! `strake-system-tests [WORD]...`: runs the whole-system tests whose names contain a word.

use std::process::ExitCode;

use strake_system_tests::cases;
use strake_system_tests::runner::{self, Before};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name] = words.as_slice()
        && flag == "--one"
    {
        return if runner::one(&cases::all(), name) {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    if words.iter().any(|word| word == "--list") {
        for test in cases::all() {
            println!("{}", test.name);
        }
        return ExitCode::SUCCESS;
    }
    // Those of a run that the lab's end cut short, as `xtask` tells it.
    let named = |flag: &str| -> Vec<String> {
        let names = words.iter().filter_map(|word| word.strip_prefix(flag));
        names.map(str::to_owned).collect()
    };
    let before = Before {
        passed: named("--passed="),
        failed: named("--failed="),
    };
    let words: Vec<String> = words
        .iter()
        .filter(|word| !word.starts_with("--"))
        .cloned()
        .collect();
    let tests = if words.is_empty() {
        cases::usual()
    } else {
        cases::all()
    };
    match runner::run(&tests, &words, &before) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
