//! Everything that can be wrong with a profile: what is observed, where, and what to do.

use strake_observe::Observation;

use super::*;

fn refused(text: &str) -> Observation {
    Profile::from_toml(&schema(), text, "bad.toml").unwrap_err()
}

#[test]
fn each_problem_has_its_identifier_its_place_and_its_remedy() {
    // (after name and priority, identifier, line and column, part of the text or the remedy)
    let cases: &[(&str, &str, &str, &str)] = &[
        ("[set\n", "profile.syntax", "3:", ""),
        ("colour = 1", "profile.key", "3:1", "no such key or rule"),
        (
            "[sett]\nheight = 1",
            "profile.key",
            "3:2",
            "did you mean 'set'",
        ),
        ("set = 1", "profile.key", "3:1", "[set]"),
        ("description = 5", "profile.key", "3:1", "text"),
        (
            "[set]\nheigth = 1",
            "profile.unknown-field",
            "4:1",
            "did you mean 'height'",
        ),
        ("[set]\nnotes = 1", "profile.unknown-field", "4:1", ""),
        (
            "[set]\nspecies = \"oak\"",
            "profile.field-not-steered",
            "4:1",
            "what a tree is",
        ),
        (
            "[set]\ngarden.size = 1",
            "profile.field-not-steered",
            "4:8",
            "of a garden",
        ),
        (
            "[match]\nsoil.wet = true\n[set]\nheight = 1",
            "profile.field-not-steered",
            "6:1",
            "no soil",
        ),
        (
            "[add]\nheight = 1",
            "profile.bad-operator",
            "4:1",
            "set, default, min, max",
        ),
        (
            "[min]\ncolour = \"red\"",
            "profile.bad-operator",
            "4:1",
            "set, default, forbid",
        ),
        (
            "[set]\nheight = \"5M\"",
            "profile.bad-value",
            "4:10",
            "a whole number",
        ),
        ("[set]\nheight = 16", "profile.bad-value", "4:10", "0 to 15"),
        (
            "[set]\nheight = -1",
            "profile.bad-value",
            "4:10",
            "cannot be -1",
        ),
        (
            "[set]\nweight = \"4 kilos\"",
            "profile.bad-value",
            "4:10",
            "a size such as",
        ),
        (
            "[set]\nweight = \"5000\"",
            "profile.bad-value",
            "4:10",
            "multiple of 4K",
        ),
        (
            "[set]\nweight = 1.5",
            "profile.bad-value",
            "4:10",
            "a size such as",
        ),
        (
            "[set]\nweight = { of = 1 }",
            "profile.bad-value",
            "4:10",
            "percent",
        ),
        (
            "[set]\nweight = { field = \"height\" }",
            "profile.bad-value",
            "4:10",
            "cannot be a share",
        ),
        (
            "[set]\ncolour = \"pink\"",
            "profile.bad-value",
            "4:10",
            "red, green, blue",
        ),
        (
            "[set]\nnotes.a = \"x\\ny\"",
            "profile.bad-value",
            "4:11",
            "one line",
        ),
        (
            "[set]\nnotes.\"a\\u0007\" = \"x\"",
            "profile.bad-value",
            "4:7",
            "key",
        ),
        (
            "[min]\nheight = 9\n[max]\nheight = 3",
            "profile.bad-value",
            "6:1",
            "line 4",
        ),
        (
            "locks = [\"height\"]",
            "profile.bad-lock",
            "3:10",
            "no rule about it",
        ),
        (
            "locks = [\"hight\"]",
            "profile.bad-lock",
            "3:10",
            "no such field",
        ),
        ("match = 1", "profile.bad-match", "3:1", "[match]"),
        (
            "[match]\nkind = \"bush\"",
            "profile.bad-match",
            "4:8",
            "tree, branch, garden",
        ),
        (
            "[match]\nnames = \"a\"",
            "profile.bad-match",
            "4:1",
            "kind, name, labels",
        ),
        ("[match]\nname = 5", "profile.bad-match", "4:1", "web*"),
        (
            "[match]\nlabels.a = 5",
            "profile.bad-match",
            "4:8",
            "not-in",
        ),
    ];
    for (text, id, place, part) in cases {
        let seen = refused(&format!("name = \"bad\"\npriority = 1\n{text}"));
        let all = format!("{} | {}", seen.text(), seen.remedy());
        assert_eq!(seen.id(), *id, "{text}: {all}");
        assert!(
            all.starts_with(&format!("bad.toml:{place}")),
            "{text}: {all}"
        );
        assert!(all.contains(part), "{text}: {all}");
        assert!(!seen.remedy().is_empty());
    }
}

#[test]
fn names_and_priorities_are_checked() {
    for (name, part) in [
        ("a\\u0007b", "\\u{7}"),
        ("", "cannot be empty"),
        ("-a", "begins with"),
        ("a b", "not ' '"),
    ] {
        let seen = refused(&format!("name = \"{name}\"\npriority = 1\n"));
        assert!(seen.is::<BadName>(), "{seen}");
        assert!(seen.text().contains(part), "{seen}");
        assert!(!seen.text().chars().any(char::is_control));
    }
    for text in [
        "priority = 1",
        "name = \"a\"",
        "name = \"a\"\npriority = 1e3",
        "name = \"a\"\npriority = 3000000000",
    ] {
        assert_eq!(refused(text).id(), "profile.key", "{text}");
    }
}

#[test]
fn several_problems_are_told_together_and_not_without_end() {
    let seen = refused("name = \"a\"\npriority = 1\n[set]\nheight = 99\ncolour = 5\n");
    assert!(seen.is::<ProfileProblems>());
    assert_eq!(seen.causes().len(), 2);
    let many: String = (0..1000).map(|n| format!("x{n} = 1\n")).collect();
    let seen = refused(&format!("name = \"a\"\npriority = 1\n[set]\n{many}"));
    assert!(seen.causes().len() <= 20);
}

#[test]
fn what_is_too_large_is_refused() {
    let head = "name = \"a\"\npriority = 1\n";
    let long = format!("{head}{}", "#".repeat(MAX_PROFILE_TEXT));
    assert!(refused(&long).is::<ProfileSyntax>());
    let many: String = (0..=MAX_RULES)
        .map(|n| format!("notes.a{n} = \"x\"\n"))
        .collect();
    let seen = refused(&format!("{head}[set]\n{many}"));
    assert!(seen.is::<TooMany>(), "{seen}");
    let names: Vec<String> = (0..300).map(|n| format!("\"n{n}\"")).collect();
    let seen = refused(&format!("{head}[match]\nname = [{}]", names.join(", ")));
    assert!(seen.is::<BadMatch>());
}

#[test]
fn two_profiles_of_one_name_are_refused_and_both_files_named() {
    let one = read("name = \"a\"\npriority = 1", "one.toml");
    let two = read("name = \"a\"\npriority = 2", "two.toml");
    let seen = ProfileSet::new(schema(), [one, two]).unwrap_err();
    assert!(seen.is::<DuplicateName>());
    assert!(seen.text().contains("one.toml and two.toml"));
}
