//! Command lines: options with values, flags and plain words.

use std::collections::BTreeMap;

/// A command line, split up.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// What is no option.
    pub words: Vec<String>,
    options: BTreeMap<String, String>,
}

impl Arguments {
    /// Splits a command line. `flags` are the options without a value, `options` those with one.
    ///
    /// # Errors
    /// A text for people if an option is unknown or lacks its value.
    pub fn parse(
        line: impl IntoIterator<Item = String>,
        flags: &[&str],
        options: &[&str],
    ) -> Result<Self, String> {
        let mut out = Self::default();
        let mut line = line.into_iter();
        while let Some(word) = line.next() {
            let Some(name) = word.strip_prefix("--") else {
                out.words.push(word);
                continue;
            };
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (name.to_owned(), None),
            };
            if flags.contains(&name.as_str()) {
                out.options.insert(name, String::new());
            } else if options.contains(&name.as_str()) {
                let value = value.or_else(|| line.next());
                let value = value.ok_or_else(|| format!("--{name} needs a value"))?;
                out.options.insert(name, value);
            } else {
                return Err(format!("unknown option --{name}; see --help"));
            }
        }
        Ok(out)
    }

    /// Whether a flag or an option is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.options.contains_key(name)
    }

    /// An option's number, with an optional suffix K, M or G (powers of 1024).
    ///
    /// # Errors
    /// A text for people if it is no number.
    pub fn number(&self, name: &str) -> Result<Option<u64>, String> {
        let Some(text) = self.options.get(name) else {
            return Ok(None);
        };
        number(text)
            .map(Some)
            .ok_or_else(|| format!("--{name} wants a number, not '{text}'"))
    }
}

/// A number with an optional suffix K, M or G.
#[must_use]
pub fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 10),
        b'M' | b'm' => (text.get(..text.len() - 1)?, 20),
        b'G' | b'g' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        let words = line.split(' ').map(str::to_owned);
        Arguments::parse(words, &["help"], &["threads", "limit"])
    }

    #[test]
    fn options_flags_and_words() {
        let line = parse("/dev/vdb --threads 4 --limit=64M --help more").unwrap();
        assert_eq!(line.words, ["/dev/vdb", "more"]);
        assert_eq!(line.number("threads"), Ok(Some(4)));
        assert_eq!(line.number("limit"), Ok(Some(64 << 20)));
        assert_eq!(line.number("seconds"), Ok(None));
        assert!(line.has("help"));
        assert!(parse("--threads").is_err());
        assert!(parse("--thread 4").is_err());
        assert!(parse("--threads x").unwrap().number("threads").is_err());
        assert_eq!(number("99999999999G"), None);
    }
}
