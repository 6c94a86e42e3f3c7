//! Running a GRUB configuration: which entries the menu has, which is the default, and what each
//! of them loads.

use std::collections::BTreeMap;

use super::super::candidate::Candidate;
use super::syntax::{self, Block, Part, Statement, Word};
use super::variables;

/// Menu entries that are kept.
const MOST_ENTRIES: usize = 256;
/// Files that include each other.
const MOST_INCLUDES: u32 = 4;
/// What all words may grow to by their variables, together.
const MOST_WORDS: usize = 16 << 20;
/// Submenus in submenus.
const MOST_SUBMENUS: u32 = 4;

/// A line of a menu.
#[derive(Clone)]
struct Item {
    title: String,
    id: Option<String>,
    body: Block,
    is_menu: bool,
}

/// What an entry has loaded.
#[derive(Default)]
struct Loaded {
    kernel: Option<(Place, String)>,
    initrds: Vec<String>,
    cmdline: String,
}

/// Where a path is.
#[derive(Clone, Default, PartialEq, Eq)]
struct Place {
    uuid: Option<String>,
    partition: Option<u32>,
}

/// A configuration being run.
pub(super) struct Run<'a> {
    directory: &'a str,
    files: &'a dyn Fn(&str) -> Option<String>,
    variables: BTreeMap<String, String>,
    menu: Vec<Item>,
    loaded: Loaded,
    /// How much more words may grow.
    left: usize,
    includes: u32,
}

impl<'a> Run<'a> {
    /// `directory` is where `grub.cfg` is, `files` reads the text files of its file system.
    pub(super) fn new(directory: &'a str, files: &'a dyn Fn(&str) -> Option<String>) -> Self {
        let known = [
            ("prefix", directory),
            ("config_directory", directory),
            ("grub_platform", "pc"),
            ("grub_cpu", "x86_64"),
        ];
        Self {
            directory,
            files,
            variables: known
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            menu: Vec::new(),
            loaded: Loaded::default(),
            left: MOST_WORDS,
            includes: 0,
        }
    }

    /// The entries of a configuration file, the default one first.
    pub(super) fn menu(mut self, text: &str) -> Vec<Candidate> {
        self.run(&syntax::parse(text));
        let default = self.get("default").unwrap_or_default();
        let mut found = Vec::new();
        let menu = std::mem::take(&mut self.menu);
        let variables = self.variables.clone();
        self.collect(&menu, &default, "", 0, &mut found);
        self.variables = variables;
        found
    }

    /// Adds the entries of a menu, the default one first.
    fn collect(
        &mut self,
        menu: &[Item],
        default: &str,
        path: &str,
        depth: u32,
        found: &mut Vec<Candidate>,
    ) {
        let (head, below) = default.split_once('>').unwrap_or((default, ""));
        let index = menu
            .iter()
            .position(|item| item.id.as_deref() == Some(head) || item.title == head)
            .or_else(|| head.trim().parse().ok())
            .filter(|index| *index < menu.len())
            .unwrap_or(0);
        let first = menu.get(index).into_iter();
        let others = menu
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != index)
            .map(|(_, item)| item);
        for (nth, item) in first.chain(others).enumerate() {
            if found.len() >= MOST_ENTRIES || self.left == 0 {
                return;
            }
            let title = if path.is_empty() {
                item.title.clone()
            } else {
                format!("{path} > {}", item.title)
            };
            let variables = self.variables.clone();
            self.run(&item.body);
            if item.is_menu {
                let menu = std::mem::take(&mut self.menu);
                if depth < MOST_SUBMENUS {
                    let default = if nth == 0 { below } else { "" };
                    self.collect(&menu, default, &title, depth + 1, found);
                }
            } else {
                self.menu.clear();
                found.extend(self.take(&title));
            }
            self.variables = variables;
        }
    }

    /// What was loaded since the last time.
    fn take(&mut self, title: &str) -> Option<Candidate> {
        let loaded = std::mem::take(&mut self.loaded);
        let (place, kernel) = loaded.kernel?;
        Some(Candidate {
            entry: format!("{}/grub.cfg '{title}'", self.directory),
            kernel,
            initrds: loaded.initrds,
            cmdline: loaded.cmdline,
            uuid: place.uuid,
            partition: place.partition,
        })
    }

    fn get(&self, name: &str) -> Option<String> {
        match self.variables.get(name) {
            Some(value) => Some(value.clone()),
            // What this GRUB can do: everything, as far as it matters here.
            None => name.starts_with("feature_").then(|| "y".to_owned()),
        }
    }

    /// Runs statements and says whether the last one succeeded.
    fn run(&mut self, block: &Block) -> bool {
        let mut fine = true;
        for statement in block.iter() {
            if self.left == 0 {
                return false;
            }
            fine = match statement {
                Statement::Command(words, body) => {
                    let words = self.expand(words);
                    self.command(&words, body.as_ref())
                }
                Statement::If(branches) => {
                    for (condition, body) in branches {
                        if condition.is_empty() || self.run(condition) {
                            self.run(body);
                            break;
                        }
                    }
                    true
                }
            };
        }
        fine
    }

    /// Words with their variables replaced.
    fn expand(&mut self, words: &[Word]) -> Vec<String> {
        let mut out = Vec::new();
        for word in words {
            let mut now = String::new();
            let mut any = word.quoted;
            for part in &word.parts {
                match part {
                    Part::Text(text) => {
                        now.push_str(text);
                        any = true;
                    }
                    Part::Variable { name, quoted } => {
                        let value = self.get(name).unwrap_or_default();
                        self.left = self.left.saturating_sub(value.len());
                        if self.left == 0 {
                            return Vec::new();
                        }
                        if *quoted {
                            now.push_str(&value);
                            continue;
                        }
                        for (index, piece) in value.split([' ', '\t', '\n']).enumerate() {
                            if index > 0 && !now.is_empty() {
                                out.push(std::mem::take(&mut now));
                            }
                            any |= !piece.is_empty();
                            now.push_str(piece);
                        }
                    }
                }
            }
            if !now.is_empty() || (any && word.quoted) {
                out.push(now);
            }
        }
        self.left = self.left.saturating_sub(1);
        out
    }

    fn command(&mut self, words: &[String], body: Option<&Block>) -> bool {
        let Some((name, arguments)) = words.split_first() else {
            return true;
        };
        match name.as_str() {
            "menuentry" | "submenu" => self.item(name == "submenu", arguments, body),
            "set" => {
                for assignment in arguments {
                    self.assign(assignment);
                }
            }
            "unset" => {
                for name in arguments {
                    self.variables.remove(name);
                }
            }
            "load_env" => self.load_env(arguments),
            "source" | "." | "configfile" => return self.include(arguments),
            "search" => self.search(arguments),
            "search.fs_uuid" => {
                if let [uuid, rest @ ..] = arguments {
                    let name = rest.first().map_or("root", String::as_str);
                    self.set(name, format!("uuid:{uuid}"));
                }
            }
            "linux" | "linux16" | "linuxefi" => self.linux(arguments),
            "initrd" | "initrd16" | "initrdefi" => {
                let paths = arguments.iter().filter(|path| !path.contains("newc:"));
                self.loaded.initrds = paths.map(|path| self.place(path).1).collect();
            }
            "[" | "test" => return self.test(arguments),
            "true" | "insmod" | "export" | "echo" | "save_env" | "terminal_output" => {}
            "false" => return false,
            _ => {
                let is_name = name
                    .split('=')
                    .next()
                    .is_some_and(|name| !name.is_empty() && !name.contains('/'));
                if name.contains('=') && is_name {
                    self.assign(name);
                } else {
                    return false;
                }
            }
        }
        true
    }

    fn set(&mut self, name: &str, value: String) {
        self.variables.insert(name.to_owned(), value);
    }

    fn assign(&mut self, assignment: &str) {
        if let Some((name, value)) = assignment.split_once('=') {
            self.set(name, value.to_owned());
        }
    }

    fn item(&mut self, is_menu: bool, arguments: &[String], body: Option<&Block>) {
        let mut title = None;
        let mut id = None;
        let mut rest = arguments.iter();
        while let Some(word) = rest.next() {
            match word.as_str() {
                "--id" => id = rest.next().cloned(),
                "--class" | "--users" | "--hotkey" | "--source" => {
                    rest.next();
                }
                _ if word.starts_with("--id=") => id = word.get(5..).map(str::to_owned),
                _ if word.starts_with("--") => {}
                _ => title = title.or_else(|| Some(word.clone())),
            }
        }
        if let (Some(title), Some(body)) = (title, body)
            && self.menu.len() < MOST_ENTRIES
        {
            self.menu.push(Item {
                title,
                id,
                body: Block::clone(body),
                is_menu,
            });
        }
    }

    /// A path without its device.
    fn local(path: &str) -> &str {
        path.strip_prefix('(')
            .and_then(|rest| rest.split_once(')'))
            .map_or(path, |(_, path)| path)
    }

    fn load_env(&mut self, arguments: &[String]) {
        let own = format!("{}/grubenv", self.directory);
        let file = match arguments {
            [flag, file, ..] if matches!(flag.as_str(), "-f" | "--file") => Self::local(file),
            _ => &own,
        };
        if let Some(text) = (self.files)(file) {
            self.variables.extend(variables(&text));
        }
    }

    fn include(&mut self, arguments: &[String]) -> bool {
        let Some(path) = arguments.first() else {
            return false;
        };
        if self.includes == MOST_INCLUDES {
            return false;
        }
        let Some(text) = (self.files)(Self::local(path)) else {
            return false;
        };
        self.includes += 1;
        self.left = self.left.saturating_sub(text.len());
        let fine = self.run(&syntax::parse(&text));
        self.includes -= 1;
        fine
    }

    fn search(&mut self, arguments: &[String]) {
        let mut variable = "root";
        let mut by_uuid = false;
        let mut what = None;
        let mut rest = arguments.iter();
        while let Some(word) = rest.next() {
            match word.as_str() {
                "--fs-uuid" | "-u" => by_uuid = true,
                "--set" | "-s" => {
                    // The name may be left out.
                    if let [name, _, ..] = rest.as_slice()
                        && !name.starts_with('-')
                    {
                        variable = name;
                        rest.next();
                    }
                }
                "--hint" => {
                    rest.next();
                }
                _ if word.starts_with("--set=") => variable = word.get(6..).unwrap_or(variable),
                _ if word.starts_with('-') => {}
                _ => what = Some(word),
            }
        }
        if let (true, Some(uuid)) = (by_uuid, what) {
            self.set(variable, format!("uuid:{uuid}"));
        }
    }

    fn linux(&mut self, arguments: &[String]) {
        let Some((path, words)) = arguments.split_first() else {
            return;
        };
        self.loaded.kernel = Some(self.place(path));
        // A word with blanks was quoted, and has to arrive as one word.
        let words: Vec<String> = words
            .iter()
            .map(|word| match word.split_once('=') {
                Some((name, value)) if word.contains(' ') && !name.contains(' ') => {
                    format!("{name}=\"{value}\"")
                }
                _ if word.contains(' ') => format!("\"{word}\""),
                _ => word.clone(),
            })
            .collect();
        self.loaded.cmdline = words.join(" ");
    }

    /// Where a path is: by its device, or by the variable `root`.
    fn place(&self, path: &str) -> (Place, String) {
        let device = path
            .strip_prefix('(')
            .and_then(|rest| rest.split_once(')'))
            .map(|(device, _)| device.to_owned())
            .or_else(|| self.get("root"))
            .unwrap_or_default();
        let device = device.trim_matches(['(', ')']);
        let place = match device.strip_prefix("uuid:") {
            Some(uuid) => Place {
                uuid: Some(uuid.to_ascii_lowercase()),
                partition: None,
            },
            // hd0,msdos1 and hd0,gpt1, or hd0,1.
            None => Place {
                uuid: None,
                partition: device.rsplit_once(',').and_then(|(_, part)| {
                    part.trim_start_matches(|letter: char| !letter.is_ascii_digit())
                        .parse()
                        .ok()
                }),
            },
        };
        (place, Self::local(path).to_owned())
    }

    fn test(&self, words: &[String]) -> bool {
        let words: Vec<&str> = words
            .iter()
            .map(String::as_str)
            .filter(|word| *word != "]")
            .collect();
        // `-o` binds less than `-a`.
        words
            .split(|word| *word == "-o")
            .any(|any| any.split(|word| *word == "-a").all(|all| self.holds(all)))
    }

    fn holds(&self, words: &[&str]) -> bool {
        let number = |word: &str| word.trim().parse::<i64>().unwrap_or(0);
        match words {
            ["!", rest @ ..] => !self.holds(rest),
            ["-z", word] => word.is_empty(),
            ["-n", word] => !word.is_empty(),
            ["-z"] => true,
            ["-e" | "-f" | "-s", path] => (self.files)(Self::local(path)).is_some(),
            [left, "=" | "==", right] => left == right,
            [left, "!=", right] => left != right,
            [left, "-eq", right] => number(left) == number(right),
            [left, "-ne", right] => number(left) != number(right),
            [left, "-lt", right] => number(left) < number(right),
            [left, "-le", right] => number(left) <= number(right),
            [left, "-gt", right] => number(left) > number(right),
            [left, "-ge", right] => number(left) >= number(right),
            // An unquoted empty variable leaves nothing.
            ["=" | "==", right] => right.is_empty(),
            ["!=", right] => !right.is_empty(),
            [word] => !word.is_empty(),
            _ => false,
        }
    }
}
