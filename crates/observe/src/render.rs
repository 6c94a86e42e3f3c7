//! An observation tree as text for people.

use crate::Observation;
use crate::os::OsCallFailed;

/// How a tree is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// No escape sequences: for files and pipes.
    Plain,
    /// Colours for a terminal.
    Terminal,
}

/// Draws the tree: the top observation and its remedy first, the causes below it with where they
/// were seen, and the remedies of the deepest.
#[must_use]
pub fn render(top: &Observation, style: Style) -> String {
    let mut out = String::new();
    let (bold, dim, red, off) = match style {
        Style::Plain => ("", "", "", ""),
        Style::Terminal => ("\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m"),
    };
    out.push_str(&format!(
        "{red}error:{off} {bold}{}{off} {dim}[{}]{off}\n",
        printable(top.text()),
        top.id()
    ));
    let deepest = top.causes().is_empty();
    if deepest {
        out.push_str(&format!("  remedy: {}\n", printable(top.remedy())));
        out.push_str(&format!("  {dim}seen by {}{off}\n", seen_by(top)));
        return out;
    }
    out.push_str(&format!("  remedy: {}\n", printable(top.remedy())));
    branches(&mut out, top, "  ", dim, off);
    out
}

fn branches(out: &mut String, of: &Observation, indent: &str, dim: &str, off: &str) {
    let last = of.causes().len().saturating_sub(1);
    for (index, cause) in of.causes().iter().enumerate() {
        let (twig, below) = if index == last {
            ("└─ ", "   ")
        } else {
            ("├─ ", "│  ")
        };
        out.push_str(&format!(
            "{indent}{twig}{} {dim}[{}]{off}\n",
            printable(cause.text()),
            cause.id()
        ));
        let indent = format!("{indent}{below}");
        out.push_str(&format!("{indent}{dim}seen by {}{off}\n", seen_by(cause)));
        if says_more(cause) {
            out.push_str(&format!("{indent}remedy: {}\n", printable(cause.remedy())));
        }
        branches(out, cause, &indent, dim, off);
    }
}

/// Whether a cause's own remedy is drawn. Above other causes it would only say to mend them; above
/// the operating system's it knows the thing that the system call was made for.
fn says_more(cause: &Observation) -> bool {
    let mut below = cause.causes().iter();
    below.all(|below| below.is::<OsCallFailed>())
}

fn seen_by(of: &Observation) -> String {
    let emitter = &of.record().emitter;
    printable(&format!(
        "{} (pid {}), thread {}",
        emitter.process, emitter.pid, emitter.thread
    ))
}

/// Paths and names may come from a guest or a disk image: nothing of them reaches the terminal as
/// a control sequence.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped: Vec<char> = if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            };
            escaped
        })
        .collect()
}
