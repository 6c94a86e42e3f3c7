//! Names with `*` and `?`.

/// Whether `name` fits `pattern`: `*` stands for any characters, `?` for one.
///
/// Linear in practice and never worse than the product of both lengths: on a mismatch only the
/// last `*` is tried again.
pub(crate) fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut again: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                again = Some((p, n));
                p += 1;
            }
            Some(&want) if want == b'?' || Some(&want) == name.get(n) => {
                p += 1;
                n += 1;
            }
            _ => match &mut again {
                Some((star, from)) => {
                    *from += 1;
                    p = *star + 1;
                    n = *from;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|&rest| rest == b'*')
}

/// Whether it has something to try.
pub(crate) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn stars_and_marks() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("web*", "web1", true),
            ("web*", "we", false),
            ("*-db-*", "a-db-1", true),
            ("*-db-*", "a-d-b-1", false),
            ("w?b1", "web1", true),
            ("w?b1", "wb1", false),
            ("**a**", "xay", true),
            ("*ab", "aab", true),
            ("", "x", false),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
        assert!(!fits(&"*a".repeat(40), &"a".repeat(39)));
    }
}
