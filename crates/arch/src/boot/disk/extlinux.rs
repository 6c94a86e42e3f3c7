//! extlinux and syslinux: `extlinux.conf`, as also written for U-Boot.

use strake_observe::Task;

use super::candidate::{Candidate, absolute};
use super::volume::Volume;

const FILES: &[(&str, &str)] = &[
    ("/boot/extlinux", "extlinux.conf"),
    ("/extlinux", "extlinux.conf"),
    ("/boot/syslinux", "syslinux.cfg"),
    ("/syslinux", "syslinux.cfg"),
    ("/boot", "extlinux.conf"),
    ("", "extlinux.conf"),
];

/// Labels that are kept of one file.
const MOST_LABELS: usize = 256;

pub(super) fn candidates(volume: &Volume, task: &mut Task) -> Vec<Candidate> {
    for (directory, name) in FILES {
        let path = format!("{directory}/{name}");
        if let Some(Some(text)) = task.attempt(volume.text(&path)) {
            return parse(&text, directory, &path);
        }
    }
    Vec::new()
}

#[derive(Default)]
struct Label {
    name: String,
    kernel: String,
    initrds: Vec<String>,
    append: Option<String>,
    menu_default: bool,
}

/// The entries, the default one first.
fn parse(text: &str, directory: &str, file: &str) -> Vec<Candidate> {
    let mut default = None;
    let mut common = String::new();
    let mut labels: Vec<Label> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        let (word, rest) = line
            .split_once(char::is_whitespace)
            .map_or((line, ""), |(word, rest)| (word, rest.trim()));
        let word = word.to_ascii_lowercase();
        if word == "label" {
            if labels.len() == MOST_LABELS {
                break;
            }
            labels.push(Label {
                name: rest.to_owned(),
                ..Label::default()
            });
            continue;
        }
        match (word.as_str(), labels.last_mut()) {
            ("default", _) => default = Some(rest.to_owned()),
            ("append", None) => rest.clone_into(&mut common),
            ("append", Some(label)) => label.append = Some(rest.to_owned()),
            ("kernel" | "linux", Some(label)) => rest.clone_into(&mut label.kernel),
            ("initrd", Some(label)) => label.initrds.extend(
                rest.split([',', ' '])
                    .filter(|path| !path.is_empty())
                    .map(str::to_owned),
            ),
            ("menu", Some(label)) if rest.eq_ignore_ascii_case("default") => {
                label.menu_default = true;
            }
            _ => {}
        }
    }
    labels.retain(|label| !label.kernel.is_empty());
    // Stable: the others keep the order of the file.
    labels.sort_by_key(|label| (default.as_ref() != Some(&label.name), !label.menu_default));
    labels
        .into_iter()
        .map(|label| {
            let append = label.append.unwrap_or_else(|| common.clone());
            let mut initrds = label.initrds;
            let mut words = Vec::new();
            for word in append.split_whitespace() {
                // syslinux also takes the RAM disk from here.
                match word.strip_prefix("initrd=") {
                    Some(paths) => initrds.extend(paths.split(',').map(str::to_owned)),
                    None => words.push(word),
                }
            }
            if words == ["-"] {
                words.clear();
            }
            Candidate {
                entry: format!("{file} '{}'", label.name),
                kernel: absolute(directory, &label.kernel),
                initrds: initrds
                    .iter()
                    .map(|path| absolute(directory, path))
                    .collect(),
                cmdline: words.join(" "),
                ..Candidate::default()
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_label_comes_first() {
        let text = "\
# comment
DEFAULT l1
APPEND common
PROMPT 0
LABEL l0
  LINUX ../vmlinuz-1
  INITRD ../initrd-1
LABEL l1
  MENU LABEL Linux two
  KERNEL /boot/vmlinuz-2
  APPEND initrd=/boot/ucode.img,/boot/initrd-2 root=LABEL=x quiet
LABEL memtest
  COM32 memtest.c32
";
        let found = parse(text, "/boot/extlinux", "/boot/extlinux/extlinux.conf");
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].kernel, "/boot/vmlinuz-2");
        assert_eq!(found[0].initrds, ["/boot/ucode.img", "/boot/initrd-2"]);
        assert_eq!(found[0].cmdline, "root=LABEL=x quiet");
        assert_eq!(found[0].entry, "/boot/extlinux/extlinux.conf 'l1'");
        assert_eq!(found[1].kernel, "/boot/extlinux/../vmlinuz-1");
        assert_eq!(found[1].cmdline, "common");
    }
}
