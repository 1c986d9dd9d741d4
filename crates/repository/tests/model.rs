//! Snapshots against a model of them.

mod images;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use images::{EXTENTS, Image, assert_restores, create, name};
use proptest::prelude::*;
use whimbrel_repository::memory::MemoryStore;
use whimbrel_repository::store::Key;
use whimbrel_repository::{Repository, VolumeTree};

/// Few extents and few contents, so that they meet.
fn extent() -> impl Strategy<Value = u64> {
    prop_oneof![0..4u64, 510..514u64, 1024..EXTENTS]
}

fn change() -> impl Strategy<Value = BTreeMap<u64, Option<u8>>> {
    prop::collection::btree_map(extent(), prop::option::weighted(0.7, 0..5u8), 0..6)
}

#[derive(Clone, Debug)]
enum Step {
    Create(BTreeMap<u64, Option<u8>>),
    Remove(prop::sample::Index),
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => change().prop_map(Step::Create),
        2 => any::<prop::sample::Index>().prop_map(Step::Remove),
        1 => Just(Step::Collect),
    ]
}

fn opened(store: &MemoryStore) -> Arc<Repository> {
    Arc::new(Repository::open_or_create(store.clone()).expect("opens"))
}

/// What snapshots of these images need, had they never been anything else.
fn needed(images: &BTreeMap<String, Image>) -> BTreeSet<Key> {
    let store = MemoryStore::default();
    let repository = opened(&store);
    for (called, image) in images {
        create(&repository, called, image, None).expect("made");
    }
    store.keys()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_was_stored_is_had_back_and_nothing_else_is_kept(steps in prop::collection::vec(step(), 1..9)) {
        let store = MemoryStore::default();
        let repository = opened(&store);
        let mut images = BTreeMap::<String, Image>::new();
        let mut last: Option<VolumeTree> = None;
        let mut now = Image::new();
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Create(changes) => {
                    for (extent, seed) in &changes {
                        match seed {
                            Some(seed) => now.insert(*extent, *seed),
                            None => now.remove(extent),
                        };
                    }
                    let changed: Vec<u64> = changes.keys().copied().collect();
                    let called = format!("s{n}");
                    let base = last.as_ref().map(|tree| (tree, &changed[..]));
                    let manifest = create(&repository, &called, &now, base).unwrap();
                    let whole = create(&repository, "whole", &now, None).unwrap();
                    prop_assert_eq!(&manifest.volumes, &whole.volumes);
                    repository.remove(&name("whole")).unwrap().unwrap();
                    last = manifest.volumes.into_iter().next();
                    images.insert(called, now.clone());
                }
                Step::Remove(index) if !images.is_empty() => {
                    let called = images.keys().nth(index.index(images.len())).unwrap().clone();
                    repository.remove(&name(&called)).unwrap().unwrap();
                    images.remove(&called);
                    // Its parts may be gone, so nothing can be a change of it.
                    last = None;
                }
                Step::Remove(_) | Step::Collect => {
                    repository.collect().unwrap();
                }
            }
            prop_assert_eq!(store.keys(), needed(&images));
        }
        for (called, image) in &images {
            assert_restores(&repository, called, image);
        }
        prop_assert_eq!(repository.verify(None, |_, _| ()).unwrap().faults, vec![]);
    }

    /// Whatever is done to an object, it is found, and told of those snapshots that have it.
    #[test]
    fn damage_is_found_and_laid_to_whom_it_harms(first in change(), second in change(), which in any::<prop::sample::Index>(), lost in any::<bool>()) {
        let store = MemoryStore::default();
        let repository = opened(&store);
        let image = |change: &BTreeMap<u64, Option<u8>>| -> Image {
            change.iter().filter_map(|(at, seed)| seed.map(|seed| (*at, seed))).collect()
        };
        let images = BTreeMap::from([("a".to_string(), image(&first)), ("b".to_string(), image(&second))]);
        for (called, image) in &images {
            create(&repository, called, image, None).unwrap();
        }
        let objects: Vec<Key> = store.keys().into_iter().filter(|key| *key != Key::Marker).collect();
        let hit = &objects[which.index(objects.len())];
        match lost && !matches!(hit, Key::Snapshot(_)) {
            true => store.lose(hit),
            false => store.tamper(hit, |object| { let last = object.len() - 1; object.truncate(last) }),
        }
        let verified = repository.verify(None, |_, _| ()).unwrap();
        prop_assert_eq!(verified.damaged, 1);
        prop_assert_eq!(&verified.faults[0].object, &hit.to_string());
        for (called, image) in &images {
            let own = needed(&BTreeMap::from([(called.clone(), image.clone())]));
            let is_told = verified.faults[0].snapshots.contains(&name(called));
            prop_assert_eq!(is_told, own.contains(hit), "{}", called);
        }
        // Nobody knows what a snapshot needs whose lists are damaged: nothing is thrown away then.
        let before = store.keys();
        let collected = repository.collect();
        prop_assert_eq!(collected.is_err(), !matches!(hit, Key::Extent(_)));
        prop_assert_eq!(store.keys(), before);
    }
}
