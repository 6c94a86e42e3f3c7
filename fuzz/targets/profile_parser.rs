//! Profiles: any text is either a profile, or refused with a place, a reason and a remedy; and a
//! profile resolves on an object, alone and against another, without a panic.
#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use strake_api::schema::schema;
use strake_profile::{Explained, Identity, Object, Profile, ProfileSet};

fn other() -> &'static Arc<Profile> {
    static OTHER: OnceLock<Arc<Profile>> = OnceLock::new();
    OTHER.get_or_init(|| {
        let text = "name = \"other\"\npriority = 10\nlocks = [\"memory\"]\n[set]\ncpus = 2\n\
                    memory = \"1G\"\n[max]\ndisk.iops = 500\n[forbid]\nconsole = \"virtio\"\n";
        Arc::new(Profile::from_toml(schema(), text, "other.toml").expect("a good profile"))
    })
}

fuzz_target!(|text: &str| {
    let profile = match Profile::from_toml(schema(), text, "fuzz.toml") {
        Ok(profile) => Arc::new(profile),
        Err(refused) => {
            assert!(!refused.text().is_empty() && !refused.remedy().is_empty());
            let _ = strake_observe::render(&refused, strake_observe::Style::Terminal);
            return;
        }
    };
    let Ok(set) = ProfileSet::new(Arc::clone(schema()), [profile, Arc::clone(other())]) else {
        return;
    };
    for kind in ["vm", "disk", "nic"] {
        let labels: BTreeMap<_, _> = [("team".to_owned(), "web".to_owned())].into();
        let context = Arc::new(labels.clone());
        let identity = Identity {
            kind: kind.to_owned(),
            name: "web1".to_owned(),
            labels,
        };
        let object = Object::new("web1", identity)
            .near("host", Arc::clone(&context))
            .near("datastore", context);
        let effective = set.effective(&object);
        for resolved in &effective.values {
            assert!(Explained::of(schema(), resolved).is_some());
        }
        for conflict in &effective.conflicts {
            assert!(!conflict.observation().text().is_empty());
        }
    }
});
