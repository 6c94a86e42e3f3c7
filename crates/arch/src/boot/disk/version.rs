//! The order of kernel versions: runs of digits by their value, the rest by its bytes.

use std::cmp::Ordering;

/// Compares two versions, so that `6.1.0-9` comes before `6.1.0-18`.
pub(super) fn compare(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    loop {
        let order = match (left.first(), right.first()) {
            (None, None) => return Ordering::Equal,
            (Some(a), Some(b)) if a.is_ascii_digit() && b.is_ascii_digit() => {
                let (a, b) = (digits(&mut left), digits(&mut right));
                // Without leading zeroes the longer number is the greater one.
                a.len().cmp(&b.len()).then_with(|| a.cmp(b))
            }
            (a, b) => {
                left = left.get(1..).unwrap_or_default();
                right = right.get(1..).unwrap_or_default();
                rank(a).cmp(&rank(b))
            }
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// A tilde comes before the end, which comes before everything else.
fn rank(byte: Option<&u8>) -> (u8, u8) {
    match byte {
        Some(b'~') => (0, 0),
        None => (1, 0),
        Some(other) => (2, *other),
    }
}

/// Takes the digits off the front, without leading zeroes.
fn digits<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    let (mut number, rest) = text.split_at(end);
    *text = rest;
    while let [b'0', more @ ..] = number {
        number = more;
    }
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_people_read_them() {
        let ordered = [
            "5.10.0-28-amd64",
            "6.1.0-9-amd64",
            "6.1.0-18-amd64",
            "6.1.0-18-cloud-amd64",
            "6.12~rc1",
            "6.12",
            "6.12.1",
            "10.0",
        ];
        for (index, left) in ordered.iter().enumerate() {
            for (other, right) in ordered.iter().enumerate() {
                assert_eq!(compare(left, right), index.cmp(&other), "{left} {right}");
            }
        }
        assert_eq!(compare("007", "7"), Ordering::Equal);
    }
}
