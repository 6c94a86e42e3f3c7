//! `strake-system-tests [WORD]...`: runs the whole-system tests whose names contain a word.

use std::process::ExitCode;

use strake_system_tests::{cases, runner};

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
    match runner::run(&cases::all(), &words) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
