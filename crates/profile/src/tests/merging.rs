//! What wins, and what is told about it.

use super::*;

fn int(n: u64) -> Option<Value> {
    Some(Value::Int(n))
}

fn words(words: &[&str]) -> Option<Value> {
    Some(Value::Set(
        words.iter().map(|word| (*word).to_owned()).collect(),
    ))
}

fn whys(effective: &Effective<'_>, path: &str) -> Vec<Why> {
    let resolved = effective.resolved(&schema().slot(path).unwrap()).unwrap();
    resolved.overrode.iter().map(|gone| gone.why).collect()
}

#[test]
fn the_order_is_default_profiles_own_value_locks() {
    let profiles = set(&[
        "priority = 10\n[set]\nheight = 6",
        "priority = 20\n[set]\nheight = 7",
        "priority = 30\n[default]\nheight = 8",
    ]);
    let plain = tree("a", &[]);
    let effective = profiles.effective(&plain);
    assert_eq!(value(&effective, "height"), int(7));
    let expected = [Why::HigherPriority, Why::OnlyDefault, Why::OnlyDefault];
    assert_eq!(whys(&effective, "height"), expected);
    let owner = tree("a", &[]).own(&schema(), "height", Value::Int(3));
    assert_eq!(value(&profiles.effective(&owner), "height"), int(3));
    let locked = set(&["priority = 1\nlocks = [\"height\"]\n[set]\nheight = 6"]);
    let effective = locked.effective(&owner);
    assert_eq!(value(&effective, "height"), int(6));
    assert_eq!(whys(&effective, "height")[0], Why::Locked);
}

#[test]
fn equal_priority_and_different_values_is_a_conflict_that_names_both() {
    let profiles = set(&[
        "priority = 10\n[set]\nheight = 6",
        "priority = 10\n[set]\n\nheight = 7",
    ]);
    for object in [
        tree("a", &[]),
        tree("a", &[]).own(&schema(), "height", Value::Int(6)), // It hides nothing.
    ] {
        let effective = profiles.effective(&object);
        assert_eq!(value(&effective, "height"), None);
        let seen = effective.conflicts[0].observation();
        assert!(seen.is::<Contradiction>());
        for part in ["p0.toml:4", "p1.toml:5", "'p0'", "'p1'", "set 6", "set 7"] {
            assert!(seen.text().contains(part), "{part}: {}", seen.text());
        }
    }
    let agreed = set(&[
        "priority = 10\n[set]\nheight = 6",
        "priority = 10\n[set]\nheight = 6",
    ]);
    let object = tree("a", &[]);
    let effective = agreed.effective(&object);
    let resolved = effective.resolved(&schema().slot("height").unwrap());
    assert_eq!(resolved.unwrap().origin.len(), 2);
    let settled = set(&[
        "priority = 10\n[set]\nheight = 6",
        "priority = 10\n[set]\nheight = 7",
        "priority = 11\n[set]\nheight = 8",
    ]);
    assert_eq!(value(&settled.effective(&object), "height"), int(8));
}

#[test]
fn bounds_move_what_has_a_lower_rank_and_yield_to_what_has_a_higher() {
    let object = tree("a", &[]);
    let of = |texts: &[&str]| value(&set(texts).effective(&object), "height");
    let (value, max) = (
        "priority = 10\n[set]\nheight = 9",
        "priority = 20\n[max]\nheight = 4",
    );
    assert_eq!(of(&[value, max]), int(4));
    let exempt = set(&["priority = 30\n[set]\nheight = 9", max]);
    let effective = exempt.effective(&object);
    assert_eq!(super::value(&effective, "height"), int(9));
    assert!(whys(&effective, "height").contains(&Why::ValueOutranks));
    // The tightest of those that hold; a bound that contradicts a higher one yields.
    let bounds = set(&[
        "priority = 10\n[min]\nheight = 12",
        "priority = 20\n[max]\nheight = 9",
        "priority = 30\n[max]\nheight = 11",
    ]);
    let effective = bounds.effective(&object);
    assert_eq!(super::value(&effective, "height"), int(5));
    assert_eq!(whys(&effective, "height"), [Why::BoundOutranks]);
    let against = set(&[
        "priority = 10\n[min]\nheight = 12",
        "priority = 10\n[max]\nheight = 9",
    ]);
    assert_eq!(against.effective(&object).conflicts.len(), 1);
}

#[test]
fn an_upper_bound_is_the_value_of_what_would_be_unlimited() {
    let profiles = set(&["priority = 1\n[max]\nlimit = 7"]);
    let object = tree("a", &[]);
    assert_eq!(value(&profiles.effective(&object), "limit"), int(7));
    // A field that is merely not there is not moved by a bound.
    let other = set(&["priority = 1\n[max]\nweight = \"1M\""]);
    assert_eq!(value(&other.effective(&object), "weight"), None);
    let own = tree("a", &[]).own(&schema(), "limit", Value::Int(9));
    assert_eq!(value(&profiles.effective(&own), "limit"), int(9));
    let locked = set(&["priority = 1\nlocks = [\"limit\"]\n[max]\nlimit = 7"]);
    assert_eq!(value(&locked.effective(&own), "limit"), int(7));
}

#[test]
fn locks_of_whatever_priority_that_disagree_are_a_conflict() {
    let profiles = set(&[
        "priority = 10\nlocks = [\"colour\"]\n[set]\ncolour = \"red\"",
        "priority = 20\nlocks = [\"colour\"]\n[set]\ncolour = \"blue\"",
    ]);
    let object = tree("a", &[]);
    let effective = profiles.effective(&object);
    assert!(effective.conflicts[0].observation().is::<LockAgainstLock>());
}

#[test]
fn sets_are_joined_and_denials_win() {
    let profiles = set(&[
        "priority = 10\n[add]\nbirds = [\"owl\", \"tit\"]\npests = [\"ant\", \"bug\"]",
        "priority = 20\n[remove]\nbirds = \"owl\"\n[forbid]\npests = \"bug\"",
        "priority = 30\n[add]\npests = \"bug\"",
    ]);
    let object = tree("a", &[]).own(&schema(), "birds", words(&["jay"]).unwrap());
    let effective = profiles.effective(&object);
    assert_eq!(value(&effective, "birds"), words(&["jay", "tit"]));
    assert_eq!(value(&effective, "pests"), words(&["ant"]));
}

#[test]
fn a_share_follows_the_field_that_it_is_a_share_of() {
    let profiles = set(&[
        "priority = 10\n[set]\nweight = \"1M\"",
        "priority = 10\n[default]\n\"weight.leaves\" = { field = \"weight\", percent = 50 }",
    ]);
    let object = tree("a", &[]);
    assert_eq!(
        value(&profiles.effective(&object), "weight.leaves"),
        int(512 << 10)
    );
    let heavy = tree("a", &[]).own(&schema(), "weight", Value::Int(2 << 20));
    assert_eq!(
        value(&profiles.effective(&heavy), "weight.leaves"),
        int(1 << 20)
    );
    let circle = set(&[
        "priority = 10\n[set]\nweight = { field = \"weight.leaves\", percent = 200 }",
        "priority = 11\n[set]\n\"weight.leaves\" = { field = \"weight\", percent = 50 }",
    ]);
    let effective = circle.effective(&object);
    assert_eq!(effective.conflicts.len(), 1);
    let seen = effective.conflicts[0].observation();
    assert!(seen.is::<CyclicReference>());
    assert!(
        seen.text().contains("p0.toml:4") && seen.text().contains("p1.toml:4"),
        "{seen}"
    );
}

#[test]
fn selectors_select_wholes_with_their_parts() {
    let profiles = set(&[
        "priority = 10\n[match]\nname = \"oak*\"\nlabels.age = [\"old\", \"ancient\"]\n\
         labels.sick = false\nlabels.zone = { not-in = \"north\" }\n\
         [set]\nheight = 9\nbranch.length = 3",
        "priority = 20\n[match]\nkind = \"branch\"\nname = \"top\"\nsoil.wet = true\n\
         [set]\nbranch.length = 4",
    ]);
    let height = |object: &Object| value(&profiles.effective(object), "height");
    assert_eq!(height(&tree("oak1", &[("age", "old")])), int(9));
    assert_eq!(
        height(&tree("oak1", &[("age", "old"), ("zone", "south")])),
        int(9)
    );
    for not in [
        tree("elm1", &[("age", "old")]),
        tree("oak1", &[("age", "young")]),
        tree("oak1", &[]),
        tree("oak1", &[("age", "old"), ("sick", "")]),
        tree("oak1", &[("age", "old"), ("zone", "north")]),
    ] {
        assert_eq!(height(&not), int(5), "{not:?}");
    }
    let whole = Arc::new(tree("oak1", &[("age", "old")]).identity().clone());
    let branch = |name: &str, soil: &[(&str, &str)]| {
        let identity = Identity {
            kind: "branch".to_owned(),
            name: name.to_owned(),
            labels: whole.labels.clone(),
        };
        Object::new(name, identity)
            .part_of(Arc::clone(&whole))
            .near("soil", Arc::new(labels(soil)))
    };
    let length = |object: &Object| value(&profiles.effective(object), "branch.length");
    assert_eq!(length(&branch("low", &[("wet", "very")])), int(3));
    assert_eq!(length(&branch("top", &[])), int(3));
    assert_eq!(length(&branch("top", &[("wet", "very")])), int(4));
}

#[test]
fn what_is_forbidden_gives_way_to_the_next_in_rank() {
    let profiles = set(&[
        "priority = 10\n[set]\ncolour = \"blue\"",
        "priority = 20\n[set]\ncolour = \"red\"",
        "priority = 30\n[forbid]\ncolour = [\"red\"]",
    ]);
    let object = tree("a", &[]);
    let effective = profiles.effective(&object);
    assert_eq!(
        value(&effective, "colour"),
        Some(Value::Text("blue".to_owned()))
    );
    let resolved = effective
        .resolved(&schema().slot("colour").unwrap())
        .unwrap();
    let explained = Explained::of(&schema(), resolved).unwrap();
    assert_eq!(explained.overrode[0].why, Why::Forbidden);
    let json = serde_json::to_string(&explained).unwrap();
    assert_eq!(serde_json::from_str::<Explained>(&json).unwrap(), explained);
}

#[test]
fn a_plan_names_what_changes_and_what_comes_into_conflict() {
    let before = set(&["priority = 10\n[set]\ncolour = \"red\""]);
    let objects = [
        tree("a", &[("old", "yes")]),
        tree("b", &[]).own(&schema(), "colour", Value::Text("green".to_owned())),
        tree("c", &[]),
    ];
    let blue = read(
        "name = \"blue\"\npriority = 20\n[set]\ncolour = \"blue\"",
        "blue.toml",
    );
    let nowhere = read(
        "name = \"nowhere\"\npriority = 20\n[match]\nname = \"z\"\n[set]\nheight = 1",
        "nowhere.toml",
    );
    let seen = plan(
        &before,
        &before.with(&[blue, nowhere], &[]).unwrap(),
        &objects,
    );
    let told: Vec<_> = seen
        .changes
        .iter()
        .map(|change| {
            (
                change.object.as_str(),
                change.path.as_str(),
                change.shown.as_str(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [("a", "colour", "red → blue"), ("c", "colour", "red → blue")]
    );
    assert!(
        seen.changes
            .iter()
            .all(|change| change.class == ChangeClass::Reboot)
    );
    assert!(seen.conflicts.is_empty());
    assert!(seen.warnings.len() == 1 && seen.warnings[0].is::<MatchesNothing>());
    let green = read(
        "name = \"green\"\npriority = 10\n[match]\nlabels.old = true\n[set]\ncolour = \"green\"",
        "green.toml",
    );
    let after = before.with(&[green], &[]).unwrap();
    let seen = plan(&before, &after, &objects);
    assert_eq!(seen.conflicts.len(), 1);
    assert_eq!(seen.conflicts[0].0, "a");
    assert!(
        seen.changes.is_empty(),
        "what is in conflict is told as a conflict alone"
    );
    let back = plan(&after, &before, &objects);
    assert_eq!((back.conflicts.len(), back.settled.len()), (0, 1));
}
