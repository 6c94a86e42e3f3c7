//! Runs the tests one after another and counts.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::failure::{Failure, Outcome};

/// A test: its name and what it does. The name also names its folders.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// Short, of letters, digits and dashes.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&str) -> Outcome,
}

/// Runs the tests whose names contain one of the words (all if there are none) and says how it
/// went. Returns how many failed.
#[must_use]
pub fn run(tests: &[Test], words: &[String]) -> usize {
    let chosen: Vec<&Test> = tests
        .iter()
        .filter(|test| words.is_empty() || words.iter().any(|word| test.name.contains(word)))
        .collect();
    let mut failed = Vec::new();
    for test in &chosen {
        print!("test {} ... ", test.name);
        let _ = std::io::stdout().flush();
        let started = Instant::now();
        let ended = catch_unwind(AssertUnwindSafe(|| (test.run)(test.name)))
            .unwrap_or_else(|_| Err(Failure::new("the test itself panicked")));
        let took = started.elapsed().as_secs_f64();
        match ended {
            Ok(()) => println!("ok ({took:.1} s)"),
            Err(failure) => {
                println!("FAILED ({took:.1} s)\n{failure}");
                failed.push(test.name);
            }
        }
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!(
        "{} passed, {} failed",
        chosen.len() - failed.len(),
        failed.len()
    );
    failed.len()
}
