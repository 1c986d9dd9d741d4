//! A folder as a repository, by several at once.

mod images;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use images::{Image, assert_restores, create, name};
use whimbrel_repository::read::VolumeReader;
use whimbrel_repository::write::SnapshotWriter;
use whimbrel_repository::{Repository, RepositoryError};

fn at(folder: &Path) -> Arc<Repository> {
    Arc::new(Repository::at_or_create(folder).expect("opens"))
}

fn files_below(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).expect("a folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .map(|path| if path.is_dir() { files_below(&path) } else { 1 })
        .sum()
}

#[test]
fn a_folder_is_a_repository_like_any_other() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let place = folder.path().join("deep/er");
    let repository = at(&place);
    let image = Image::from([(0, 1), (700, 2), (1029, 3)]);
    let manifest = create(&repository, "one", &image, None).expect("made");
    let mut changed = image.clone();
    changed.insert(700, 9);
    let base = Some((&manifest.volumes[0], &[700][..]));
    create(&repository, "two", &changed, base).expect("made");
    assert_eq!(at(&place).id(), repository.id());
    // The lock, the marker, two manifests, four extents, and leaves of which one changed.
    assert_eq!(files_below(&place), 2 + 2 + 4 + 4);
    let again = create(&repository, "two", &changed, None).expect_err("the name is taken");
    assert!(matches!(again, RepositoryError::Exists { .. }), "{again}");
    repository
        .remove(&name("one"))
        .expect("removed")
        .expect("collected");
    assert_restores(&repository, "two", &changed);
    assert_eq!(files_below(&place), 2 + 1 + 3 + 3);
}

#[test]
fn what_is_no_repository_is_left_alone() {
    let folder = tempfile::tempdir().expect("temporary folder");
    fs::write(folder.path().join("letter"), "dear").expect("written");
    let error = Repository::at_or_create(folder.path())
        .err()
        .expect("refused");
    assert!(matches!(error, RepositoryError::Foreign { .. }), "{error}");
    let error = Repository::at(folder.path()).err().expect("refused");
    assert!(
        matches!(error, RepositoryError::NotARepository { .. }),
        "{error}"
    );
    let newer = tempfile::tempdir().expect("temporary folder");
    fs::write(
        newer.path().join("repository"),
        "whimbrel-repository 2 00\n",
    )
    .expect("written");
    let error = Repository::at_or_create(newer.path())
        .err()
        .expect("refused");
    assert!(matches!(error, RepositoryError::Unknown { .. }), "{error}");
}

#[test]
fn nothing_is_removed_while_somebody_reads_or_adds() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (one, other) = (at(folder.path()), at(folder.path()));
    let image = Image::from([(5, 5)]);
    create(&one, "s", &image, None).expect("made");
    let writer = SnapshotWriter::begin(one.clone(), name("t")).expect("begun");
    let busy = |r: Result<(), RepositoryError>| matches!(r, Err(RepositoryError::Busy { .. }));
    assert!(busy(other.collect().map(drop)));
    assert!(busy(other.remove(&name("s")).map(drop)));
    drop(writer);
    let reader = VolumeReader::open(one.clone(), &name("s"), Some("disk")).expect("opened");
    assert!(busy(other.remove(&name("s")).map(drop)));
    drop(reader);
    other.collect().expect("nobody is there");
    assert_restores(&one, "s", &image);
    other
        .remove(&name("s"))
        .expect("nobody is there")
        .expect("collected");
}

#[test]
fn what_killed_writers_left_goes_and_what_is_not_ours_stays() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let repository = at(folder.path());
    create(&repository, "s", &Image::from([(5, 5)]), None).expect("made");
    let left = folder.path().join("tmp/1234-5");
    fs::write(&left, "half").expect("written");
    let foreign = [
        folder.path().join("extents/README"),
        folder.path().join("snapshots/.s.swp"),
    ];
    for path in &foreign {
        fs::write(path, "mine").expect("written");
    }
    repository.collect().expect("collected");
    assert!(!left.exists());
    assert!(foreign.iter().all(|path| path.exists()));
    assert_eq!(repository.names().expect("listed"), [name("s")]);
}

#[test]
fn snapshots_made_and_removed_by_many_at_once_are_whole_or_not_there() {
    let folder = tempfile::tempdir().expect("temporary folder");
    at(folder.path());
    std::thread::scope(|scope| {
        for worker in 0..3u8 {
            let repository = at(folder.path());
            scope.spawn(move || {
                for round in 0..6u8 {
                    // Much the same content by all, so that they rely on what another one is removing.
                    let image = Image::from([(0, 1), (1, round), (2, worker)]);
                    let called = format!("w{worker}-{}", round % 2);
                    match repository.remove(&name(&called)) {
                        Ok(collected) => drop(collected.expect("all can be read")),
                        Err(RepositoryError::Busy { .. } | RepositoryError::NoSnapshot { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                    match create(&repository, &called, &image, None) {
                        Ok(_) => assert_restores_if_possible(&repository, &called, &image),
                        Err(RepositoryError::Busy { .. } | RepositoryError::Exists { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    let repository = at(folder.path());
    let verified = repository.verify(None, |_, _| ()).expect("verified");
    assert!(verified.snapshots > 0);
    assert_eq!(verified.faults, []);
}

/// Nobody else removes it, but reading is refused while somebody removes another.
fn assert_restores_if_possible(repository: &Arc<Repository>, called: &str, image: &Image) {
    match VolumeReader::open(repository.clone(), &name(called), None) {
        Ok(_reader) => assert_restores(repository, called, image),
        Err(RepositoryError::Busy { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}
