//! The Boot Loader Specification: one file per entry in `loader/entries`.

use std::cmp::Reverse;

use strake_observe::Task;

use super::candidate::Candidate;
use super::grub::environment;
use super::version;
use super::volume::Volume;

/// Where a boot partition or a root file system has them.
const ROOTS: &[&str] = &["/boot", ""];

/// Entries that are read.
const MOST: usize = 64;

pub(super) fn candidates(volume: &Volume, task: &mut Task) -> Vec<Candidate> {
    for root in ROOTS {
        let directory = format!("{root}/loader/entries");
        let mut names = task.attempt(volume.names(&directory)).unwrap_or_default();
        names.retain(|name| name.ends_with(".conf"));
        if names.is_empty() {
            continue;
        }
        names.sort();
        names.truncate(MOST);
        let environment = environment(volume, root, task);
        let mut entries = Vec::new();
        for name in names {
            let path = format!("{directory}/{name}");
            if let Some(Some(text)) = task.attempt(volume.text(&path)) {
                entries.extend(Entry::parse(&name, &text, &|name| {
                    environment.get(name).cloned()
                }));
            }
        }
        let loader = task
            .attempt(volume.text(&format!("{root}/loader/loader.conf")))
            .flatten();
        let wanted = environment
            .get("saved_entry")
            .cloned()
            .or_else(|| loader.as_deref().and_then(default_of));
        sort(&mut entries, wanted.as_deref());
        return entries
            .into_iter()
            .map(|entry| entry.candidate(volume, root, &directory))
            .collect();
    }
    Vec::new()
}

/// The `default` of systemd-boot's `loader.conf`.
fn default_of(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().split_once(char::is_whitespace))
        .find(|(key, _)| *key == "default")
        .map(|(_, value)| value.trim().to_owned())
}

struct Entry {
    /// The file's name without its suffix and without a boot counter.
    id: String,
    title: String,
    version: String,
    sort_key: String,
    kernel: String,
    initrds: Vec<String>,
    options: Vec<String>,
}

impl Entry {
    fn parse(file: &str, text: &str, variable: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let id = file.strip_suffix(".conf").unwrap_or(file);
        let id = id.split_once('+').map_or(id, |(id, _)| id);
        let mut entry = Self {
            id: id.to_owned(),
            title: id.to_owned(),
            version: String::new(),
            sort_key: String::new(),
            kernel: String::new(),
            initrds: Vec::new(),
            options: Vec::new(),
        };
        for line in text.lines() {
            let line = line.trim();
            let Some((key, value)) = line.split_once(char::is_whitespace) else {
                continue;
            };
            let value = value.trim();
            match key {
                "title" => value.clone_into(&mut entry.title),
                "version" => value.clone_into(&mut entry.version),
                "sort-key" => value.clone_into(&mut entry.sort_key),
                "linux" => value.clone_into(&mut entry.kernel),
                // Fedora's may end in variables, which are empty but for special builds.
                "initrd" => entry.initrds.extend(
                    value
                        .split_whitespace()
                        .filter(|word| !word.starts_with('$'))
                        .map(str::to_owned),
                ),
                "options" => {
                    for word in value.split_whitespace() {
                        match word.strip_prefix('$') {
                            Some(name) => {
                                let name = name.trim_matches(['{', '}']);
                                entry.options.extend(variable(name));
                            }
                            None => entry.options.push(word.to_owned()),
                        }
                    }
                }
                _ => {}
            }
        }
        (!entry.kernel.is_empty()).then_some(entry)
    }

    fn candidate(self, volume: &Volume, root: &str, directory: &str) -> Candidate {
        // The paths are relative to the partition; some tools write them without /boot even if
        // that is no partition of its own.
        let place = |path: &str| {
            let path = path.trim_start_matches('/');
            let inside = format!("{root}/{path}");
            let plain = format!("/{path}");
            if !volume.has(&plain) && volume.has(&inside) {
                inside
            } else {
                plain
            }
        };
        Candidate {
            kernel: place(&self.kernel),
            initrds: self.initrds.iter().map(|path| place(path)).collect(),
            cmdline: self.options.join(" "),
            entry: format!("{directory}/{}.conf '{}'", self.id, self.title),
            ..Candidate::default()
        }
    }
}

/// The wanted one first, then the newest; rescue entries last.
fn sort(entries: &mut [Entry], wanted: Option<&str>) {
    entries.sort_by(|left, right| {
        let key = |entry: &Entry| {
            (
                Reverse(wanted.is_some_and(|wanted| matches(wanted, &entry.id))),
                entry.id.contains("rescue"),
                entry.sort_key.clone(),
            )
        };
        key(left)
            .cmp(&key(right))
            .then_with(|| version::compare(&right.version, &left.version))
            .then_with(|| version::compare(&right.id, &left.id))
    });
}

/// Whether an entry is the wanted one: its name, with or without suffix, or a beginning and `*`.
fn matches(wanted: &str, id: &str) -> bool {
    let wanted = wanted.strip_suffix(".conf").unwrap_or(wanted);
    match wanted.strip_suffix('*') {
        Some(beginning) => id.starts_with(beginning),
        None => id == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(file: &str, version: &str) -> Entry {
        let text = format!("title T\nversion {version}\nlinux /vmlinuz-{version}\n");
        Entry::parse(file, &text, &|_| None).unwrap()
    }

    #[test]
    fn entries_are_parsed_with_their_variables() {
        let text = "title Fedora\nversion 6.1\nlinux /vmlinuz-6.1\n\
                    initrd /initramfs-6.1.img $tuned_initrd\n\
                    options $kernelopts quiet ${missing} rhgb\ngrub_users $x\n";
        let entry = Entry::parse("abc-6.1+3.conf", text, &|name| {
            (name == "kernelopts").then(|| "root=UUID=1 ro".to_owned())
        })
        .unwrap();
        assert_eq!(entry.id, "abc-6.1");
        assert_eq!(entry.initrds, ["/initramfs-6.1.img"]);
        assert_eq!(entry.options, ["root=UUID=1 ro", "quiet", "rhgb"]);
        assert!(Entry::parse("x.conf", "title nothing\n", &|_| None).is_none());
    }

    #[test]
    fn the_newest_comes_first_unless_another_is_wanted() {
        let order = |wanted: Option<&str>| {
            let mut entries = [
                entry("m-6.1.9.conf", "6.1.9"),
                entry("m-0-rescue.conf", "9"),
                entry("m-6.1.10.conf", "6.1.10"),
                entry("m-5.conf", "5"),
            ];
            sort(&mut entries, wanted);
            entries.map(|entry| entry.version).join(" ")
        };
        assert_eq!(order(None), "6.1.10 6.1.9 5 9");
        assert_eq!(order(Some("m-5")), "5 6.1.10 6.1.9 9");
        assert_eq!(order(Some("m-6.1.9.conf")), "6.1.9 6.1.10 5 9");
        assert_eq!(order(Some("m-6*")), "6.1.10 6.1.9 5 9");
        assert_eq!(default_of("timeout 3\ndefault  m-*\n").unwrap(), "m-*");
    }
}
