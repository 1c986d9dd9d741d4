//! Everything that changes a repository, killed at each of its steps, with and without the power cut.

mod images;

use std::collections::BTreeMap;
use std::sync::Arc;

use images::{Image, assert_restores, create, name};
use whimbrel_repository::memory::MemoryStore;
use whimbrel_repository::store::Key;
use whimbrel_repository::{Repository, RepositoryError};

/// Bits that look random and are the same each time.
fn coin(seed: u64) -> impl FnMut() -> bool {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state & 8 != 0
    }
}

fn images() -> BTreeMap<&'static str, Image> {
    let first = Image::from([(0, 1), (1, 2), (600, 3)]);
    let mut second = first.clone();
    second.extend([(1, 4), (513, 1), (1029, 2)]);
    let third = Image::from([(0, 1), (2, 9)]);
    BTreeMap::from([("first", first), ("second", second), ("third", third)])
}

/// A day in the life of a repository: an incremental snapshot, one removed, one made after that.
fn day(
    repository: &Arc<Repository>,
    images: &BTreeMap<&str, Image>,
) -> Result<(), RepositoryError> {
    let first = repository.manifest(&name("first"))?;
    let base = Some((&first.volumes[0], &[1, 513, 1029][..]));
    create(repository, "second", &images["second"], base)?;
    repository.remove(&name("first"))??;
    create(repository, "third", &images["third"], None)?;
    repository.remove(&name("second"))??;
    Ok(())
}

fn begun() -> (MemoryStore, Arc<Repository>) {
    let store = MemoryStore::default();
    let repository = Repository::open_or_create(store.clone()).expect("made");
    let repository = Arc::new(repository);
    create(&repository, "first", &images()["first"], None).expect("made");
    (store, repository)
}

#[test]
fn whenever_it_is_killed_each_snapshot_there_is_is_whole() {
    let images = images();
    let (store, repository) = begun();
    let before = store.steps();
    day(&repository, &images).expect("nobody kills it");
    let steps = store.steps() - before;
    assert!(steps > 20, "{steps}");
    // Zero cuts no power, the others lose something else each.
    for (killed_at, cut) in (0..steps).flat_map(|at| (0..12).map(move |cut| (at, cut))) {
        let (store, repository) = begun();
        store.kill_after(killed_at);
        let error = day(&repository, &images).expect_err("it was killed");
        assert!(matches!(error, RepositoryError::Crash), "{error}");
        let mut keep = coin(cut * 1000 + killed_at);
        store.revive(if cut == 0 { None } else { Some(&mut keep) });
        let names = repository.names().expect("listed");
        assert!(!names.is_empty() || killed_at > 0);
        for name in &names {
            assert_restores(&repository, name.as_str(), &images[name.as_str()]);
        }
        // What is left over goes, and what is there stays; the day can be lived again.
        repository.collect().expect("collected");
        for name in &names {
            assert_restores(&repository, name.as_str(), &images[name.as_str()]);
        }
        for (called, image) in &images {
            if !names.iter().any(|name| name.as_str() == *called) {
                create(&repository, called, image, None).expect("made");
            }
            assert_restores(&repository, called, image);
        }
        let verified = repository.verify(None, |_, _| ()).expect("verified");
        assert_eq!((verified.snapshots, verified.damaged), (3, 0));
        for called in images.keys() {
            repository
                .remove(&name(called))
                .expect("removed")
                .expect("collected");
        }
        assert_eq!(store.keys().into_iter().collect::<Vec<_>>(), [Key::Marker]);
    }
}

#[test]
fn a_finished_snapshot_outlives_a_power_cut_at_once() {
    let (store, repository) = begun();
    store.revive(Some(&mut || false));
    assert_restores(&repository, "first", &images()["first"]);
}
