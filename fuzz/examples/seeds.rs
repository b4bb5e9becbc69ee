//! Writes the seed corpora: `fuzz/run seeds`. They are made of the golden files, and of what today's code leaves on the
//! disk at each step of a few stories.

#[allow(dead_code)]
#[path = "../../crates/blockferry-transfer-log/tests/log/harness.rs"]
mod harness;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockferry::core::{
    BlockSize, Digest, Geometry, ManifestWriter, RegionIndex, RegionLeaves, Root, block_digest,
};
use blockferry::device::{Evidence, Identity, MemoryDevice};
use blockferry::transfer_log::{
    GroupDirectory, GroupId, Place, Replica, Result, Session, SessionId, Strategy, frame,
};
use blockferry::transport::{Message, Preamble, ShortDigests, Width, message};
use blockferry_fuzz::machine::{TARGET, device, image};
use blockferry_fuzz::pages::{CHAINED, FILES, Files, PAGE, STATE, pack};
use blockferry_testkit::{OperationKind, SimDisk, SimOptions};

use harness::{Setup, quiet, root};

/// Pages of a state file; the golden ones leave out the blank pages at the end.
const STATE_PAGES: usize = 35;
/// Session of the golden files, and the first byte of its id.
const SESSION: u8 = 0x51;
const GROUP: GroupId = GroupId::from_bytes([0x67; 16]);
/// Things to do after opening.
const NEXT: u8 = 6;

fn main() -> std::io::Result<()> {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixtures = fuzz.join("../tests/fixtures");
    let seeds = Seeds(fuzz.join("seeds"));
    if seeds.0.exists() {
        fs::remove_dir_all(&seeds.0)?;
    }
    manifests(&fixtures.join("manifest/v1"), &seeds)?;
    golden_replicas(&fixtures.join("replica/v1"), &seeds)?;
    stories(&seeds)?;
    for (name, line) in COMMAND_LINES {
        seeds.write("command_line", name, line.replace(' ', "\0").as_bytes())?;
    }
    seeds.write("command_line", "bytes", b"a\xff'b\0file:///%\0it's\0~\0a b")?;
    for (name, bytes) in fields() {
        seeds.write("codec", name, &bytes)?;
    }
    for (name, bytes) in lives() {
        seeds.write("operations", &name, &bytes)?;
    }
    for (name, bytes) in conversations() {
        seeds.write("wire", name, &bytes)?;
    }
    for (name, bytes) in nbd_clients() {
        seeds.write("nbd_server", name, &bytes)?;
    }
    for (name, bytes) in nbd_servers() {
        seeds.write("nbd", name, &bytes)?;
    }
    // Images that differ, shortened digests or whole ones, all of it or what differs; pages that come twice; one message
    // in so many changed on its way, of all or of those with pages; as many regions at once, and with a map.
    for (name, shape, changed, window) in [
        ("delta", 0b1000, 0, 8),
        ("exact", 0b1_0011, 0, 8),
        ("whole", 0x80 | 0b1010, 0, 8),
        ("alike", 0b1010, 0, 8),
        ("twice", 0x40 | 0b1000, 0, 8),
        ("changed", 0b1000, 5, 8),
        ("changed-exact", 0b1_0011, 9, 8),
        ("changed-whole", 0x80 | 0b1010, 17, 8),
        ("changed-pages", 0x20 | 0b1000, 2, 8),
        ("mapped", 0b1000, 0, 0x81),
        ("changed-mapped", 0b1_0010, 9, 0x82),
    ] {
        let draws = (0u8..=255)
            .cycle()
            .take(600)
            .map(|n| n.wrapping_mul(97) >> 2);
        let bytes: Vec<u8> = [shape, changed, window].into_iter().chain(draws).collect();
        seeds.write("roles", name, &bytes)?;
    }
    // These read an arbitrary structure out of their bytes: any bytes will do.
    for (target, count) in [
        ("codec", 4),
        ("extents", 16),
        ("operations", 8),
        ("roles", 8),
    ] {
        for seed in 0..count {
            seeds.write(target, &seed.to_string(), &noise(seed))?;
        }
    }
    Ok(())
}

/// Where seeds are written.
struct Seeds(PathBuf);

impl Seeds {
    fn write(&self, target: &str, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        let path = self.0.join(target).join(name);
        fs::create_dir_all(path.parent().expect("it lies in a directory"))?;
        fs::write(path, bytes)
    }

    /// Files beside a target, for `replay`, and their state alone, for `state`.
    fn write_files(&self, name: &str, choice: u8, files: &Files) -> std::io::Result<()> {
        let seed = |files: &Files| [&[choice], &pack(files)[..]].concat();
        self.write("replay", name, &seed(files))?;
        let mut state = Files::default();
        state[STATE].clone_from(&files[STATE]);
        if state[STATE].is_some() {
            self.write("state", name, &seed(&state))?;
        }
        Ok(())
    }
}

fn choice(is_file: bool, is_new: bool, next: u8) -> u8 {
    u8::from(is_file) | u8::from(is_new) << 1 | next << 2
}

/// The golden manifest and the damaged ones, one of several regions, and an empty one.
fn manifests(golden: &Path, seeds: &Seeds) -> std::io::Result<()> {
    for manifest in files_of(golden)? {
        let name = manifest.file_name().expect("it is a file");
        seeds.write("manifest", &name.to_string_lossy(), &fs::read(&manifest)?)?;
    }
    let block_size = BlockSize::new(4096).expect("a block size");
    let geometry = Geometry::new((3 << 20) + 100, block_size);
    for (name, regions) in [("regions", &[0, 1, 3][..]), ("zeros", &[])] {
        let mut bytes = Vec::new();
        let mut writer = ManifestWriter::new(geometry, &mut bytes).expect("memory takes all");
        for region in regions.iter().filter(|r| **r < geometry.region_count()) {
            let mut leaves = RegionLeaves::zero(&geometry, RegionIndex::new(*region));
            leaves.set(0, Digest::from_bytes([7; 32]));
            if leaves.len() > 9 {
                leaves.set(9, block_digest(b"nine"));
            }
            writer.push(&leaves).expect("memory takes all");
        }
        writer.finish().expect("memory takes all");
        seeds.write("manifest", name, &bytes)?;
    }
    Ok(())
}

const COMMAND_LINES: [(&str, &str); 12] = [
    (
        "sync",
        "sync a.raw /dev/disk/by-id/b:c --mode delta --block-size 64KiB --undo none --threads 4 --bwlimit 1.5M/s --dry-run",
    ),
    (
        "sync-strategy",
        "sync file:///a%20b%FF ./t --strategy shadow --strict --rescan --allow-shrink --json",
    ),
    (
        "resume",
        "resume t --bwlimit 1500KB/s --threads 3 --log-limit 4GiB --crash-consistent --no-read-back",
    ),
    (
        "remote",
        "diff user@host:/path nbd+unix:///export?socket=/run/nbd ssh://h/d blockferry://h/d qcow2+file:a https://h/d",
    ),
    (
        "digest",
        "digest image --manifest out --block-size 1MiB -q --state file:///s%00 file://host/a",
    ),
    ("verify", "verify a b -v"),
    ("decide", "rollback t --state /s"),
    ("demo", "demo --size 10.5MB --keep --dir d"),
    ("id", "completions bash 51515151515151515151515151515151"),
    (
        "server",
        "sync --certs /c blockferry://h.example:7417/web-1 blockferry://[::1]/x serve --listen [::]:0 --config f certs",
    ),
    ("brackets", "sync ]:dry-run [-oProxyCommand=x]:/a"),
    (
        "hosts",
        "sync -e ssh --remote-path bf me@[::1]:rel ssh://me@h:22/a%20b serve --stdio pushed://h/a",
    ),
];

/// What a client of NBD says, behind a byte that tells whether it may write.
fn nbd_clients() -> Vec<(&'static str, Vec<u8>)> {
    let be = |number: u64, bytes: usize| number.to_be_bytes()[8 - bytes..].to_vec();
    let option = |number: u64, body: &[u8]| {
        let head = [
            b"IHAVEOPT".to_vec(),
            be(number, 4),
            be(body.len() as u64, 4),
        ]
        .concat();
        [head, body.to_vec()].concat()
    };
    let text = |text: &[u8]| [be(text.len() as u64, 4), text.to_vec()].concat();
    let request = |flags: u64, kind: u64, cookie: u64, offset: u64, length: u64| {
        let head = [be(0x2560_9513, 4), be(flags, 2), be(kind, 2), be(cookie, 8)].concat();
        [head, be(offset, 8), be(length, 4)].concat()
    };
    let go = option(7, &[text(b"disk"), be(1, 2), be(3, 2)].concat());
    let context = [text(b"disk"), be(1, 4), text(b"base:allocation")].concat();
    let new = [be(3, 4), option(8, &[]), option(10, &context), go.clone()].concat();
    let old = [be(1, 4), option(3, &[]), option(1, b"disk")].concat();
    let read = [
        request(0, 0, 1, 0, 12_988),
        request(0, 0, 2, 4095, 3),
        request(0, 0, 3, 12_900, 200),
        request(0, 2, 4, 0, 0),
    ]
    .concat();
    let write = [
        request(0, 1, 1, 100, 20),
        vec![9; 20],
        request(1, 1, 2, 4000, 300),
        vec![8; 300],
        request(0, 6, 3, 5000, 6000),
        request(2, 6, 4, 0, 50),
        request(0, 4, 5, 12_288, 700),
        request(0, 3, 6, 0, 0),
        request(0, 0, 7, 0, 12_988),
    ]
    .concat();
    let status = [request(0, 7, 1, 0, 12_988), request(8, 7, 2, 5, 9000)].concat();
    let said = |how: u8, parts: &[&[u8]]| [&[how], parts.concat().as_slice()].concat();
    vec![
        ("read", said(0, &[&new, &read])),
        ("read-old", said(0, &[&old, &read])),
        ("write", said(1, &[&new, &write])),
        ("write-old", said(1, &[&old, &write])),
        ("denied", said(0, &[&new, &write])),
        ("status", said(1, &[&new, &write, &status])),
        (
            "leave",
            said(
                0,
                &[
                    &be(3, 4),
                    &option(6, &[text(b""), be(0, 2)].concat()),
                    &option(2, &[]),
                ],
            ),
        ),
    ]
}

/// What a server of NBD says to someone who wants something, by the choice in the first byte.
fn nbd_servers() -> Vec<(&'static str, Vec<u8>)> {
    let be = |number: u64, bytes: usize| number.to_be_bytes()[8 - bytes..].to_vec();
    let reply = |option: u64, kind: u64, body: &[u8]| {
        let head = [be(0x0003_e889_0455_65a9, 8), be(option, 4), be(kind, 4)].concat();
        [head, be(body.len() as u64, 4), body.to_vec()].concat()
    };
    let info = |body: Vec<u8>| reply(7, 3, &body);
    let chunk = |flags: u64, kind: u64, cookie: u64, body: Vec<u8>| {
        let head = [be(0x668e_33ef, 4), be(flags, 2), be(kind, 2), be(cookie, 8)].concat();
        [head, be(body.len() as u64, 4), body].concat()
    };
    let simple =
        |error: u64, cookie: u64| [be(0x6744_6698, 4), be(error, 4), be(cookie, 8)].concat();
    let greeting = [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat();
    let go = [
        info([be(0, 2), be(1 << 30, 8), be(0b1_0110_1101, 2)].concat()),
        info([be(3, 2), be(512, 4), be(4096, 4), be(1 << 25, 4)].concat()),
        reply(7, 1, &[]),
    ]
    .concat();
    let plain = [greeting.clone(), reply(8, 1, &[]), go.clone()].concat();
    let mapped = [
        greeting.clone(),
        reply(8, 1, &[]),
        reply(10, 4, &[be(9, 4), b"base:allocation".to_vec()].concat()),
        reply(10, 1, &[]),
        go,
    ]
    .concat();
    let old = [
        greeting.clone(),
        reply(8, (1 << 31) + 1, &[]),
        reply(7, (1 << 31) + 1, &[]),
        be(1 << 30, 8),
        be(5, 2),
    ]
    .concat();
    let said = |how: u8, parts: &[Vec<u8>]| [vec![how], parts.concat()].concat();
    let parts = [
        plain.clone(),
        chunk(0, 1, 1, [be(8192, 8), vec![5; 4000]].concat()),
        chunk(1, 2, 1, [be(12_192, 8), be(96, 4)].concat()),
        chunk(1, 1, 2, [be(100, 8), vec![6; 700]].concat()),
    ];
    let failed = [be(5, 4), be(4, 2), b"oops".to_vec()].concat();
    let runs = [be(9, 4), be(4096, 4), be(3, 4), be(1 << 19, 4), be(0, 4)].concat();
    vec![
        ("read", said(0, &parts)),
        (
            "read-old",
            said(
                0,
                &[old, simple(0, 1), vec![5; 4096], simple(0, 2), vec![6; 700]],
            ),
        ),
        (
            "write",
            said(3 << 2, &[plain.clone(), simple(0, 2), simple(28, 1)]),
        ),
        (
            "failed",
            said(
                0,
                &[plain.clone(), chunk(1, 1 << 15, 2, failed), simple(5, 1)],
            ),
        ),
        ("flush", said(4 << 2, &[plain, simple(0, 1)])),
        ("status", said(6 << 2 | 1, &[mapped, chunk(1, 5, 1, runs)])),
        (
            "refused",
            said(0, &[greeting, reply(8, (1 << 31) + 5, b"TLS, please")]),
        ),
    ]
}

/// A greeting, and what both sides of a sync say, each with the choice how it is read.
fn conversations() -> Vec<(&'static str, Vec<u8>)> {
    let digest = block_digest(b"block");
    let short = |width, count| ShortDigests::of(width, std::iter::repeat_n(digest, count));
    let begin = Message::Begin(message::Begin {
        block_size: BlockSize::DEFAULT,
        exact: false,
        level: 1,
        window: 64,
        mapped: true,
    });
    let open = Message::Open(message::Open {
        role: message::Role::Target,
        path: b"/disk".to_vec(),
        options: b"{\"strict\":true}".to_vec(),
    });
    let run = |first, count, zero| message::PageRun { first, count, zero };
    let source = [
        Message::Source(message::Source {
            label: "disk".to_owned(),
            size_bytes: 1 << 30,
            identity: Identity::from_bytes(b"inode"),
            evidence: Evidence::from_bytes(b"times"),
        }),
        Message::Regions {
            regions: vec![1, 5],
            digests: short(Width::Sixteen, 2),
            below: 9,
        },
        Message::Sampled(message::Sampled {
            data_blocks: 1 << 14,
            blocks: 2,
            reading_ns: 5,
            digesting_ns: 7,
        }),
        Message::Blocks {
            region: 5,
            differing: vec![(0, None), (255, Some(digest))],
        },
        Message::Data {
            blocks: vec![(5, 3)],
            runs: vec![run(1, 2, false), run(3, 1, true)],
            frame: frame::pack(&[7; 8192], 1).expect("memory takes all"),
        },
        Message::Scanned {
            root: Root::from_bytes([3; 32]),
            read_bytes: 4096,
        },
        Message::Stopped,
        Message::Failed(message::Failed {
            kind: 3,
            resumable: true,
            text: "no such disk".to_owned(),
        }),
        Message::Answer(b"\"done\"".to_vec()),
    ];
    let target = [
        open,
        Message::Examine,
        Message::Sample(message::Sample {
            block_size: BlockSize::DEFAULT,
            level: 1,
            most: 2,
            seed: 5,
        }),
        begin,
        Message::OpenRegion {
            region: 5,
            blocks: short(Width::Eight, 256),
        },
        Message::OpenBlocks {
            region: 6,
            blocks: vec![(0, Some(digest)), (255, None)],
        },
        Message::Want {
            region: 5,
            blocks: vec![(3, short(Width::Four, 16)), (255, short(Width::Whole, 0))],
        },
        Message::Release(12),
        Message::Event(b"{\"decision\":\"delta\"}".to_vec()),
        Message::Ping,
        Message::Pong,
        Message::Stop,
        Message::Outcome(b"{}".to_vec()),
        Message::Ask(b"\"reach\"".to_vec()),
    ];
    let said = |how: [u8; 2], messages: &[Message]| {
        let mut bytes = how.to_vec();
        bytes.extend(Preamble::OURS.encode());
        messages
            .iter()
            .for_each(|message| message.encode(&mut bytes));
        bytes
    };
    vec![
        ("source", said([1, 250], &source)),
        ("target", said([1, 6], &target)),
        ("stranger", said([0, 32], &target[..1])),
    ]
}

/// Every golden scene with each thing to do next, and every damaged one of them.
fn golden_replicas(scenes: &Path, seeds: &Seeds) -> std::io::Result<()> {
    for scene in directories_of(scenes)? {
        let (name, files) = (name_of(&scene), files_in(&scene));
        for next in 0..NEXT {
            let choice = choice(false, name == "applied", next);
            seeds.write_files(&format!("golden-{name}-{next}"), choice, &files)?;
        }
        let seed = match &name[..] {
            "applied" => ("endless", without_next(choice(false, true, 1), &files)),
            "staged" => ("cut", durable_and_cut(choice(false, false, 0), &files)),
            "compressed" => ("unchained", unchained(choice(false, false, 0), &files)),
            _ => continue,
        };
        seeds.write("replay", seed.0, &seed.1)?;
    }
    for (scene, cases) in DAMAGED {
        let files = files_in(&scenes.join(scene));
        for case in cases {
            let mut files = files.clone();
            let damaged = files_in(&scenes.join("damaged").join(case));
            for (file, damaged) in files.iter_mut().zip(damaged) {
                *file = damaged.or(file.take());
            }
            let choice = choice(false, scene == "applied", 0);
            seeds.write_files(&format!("damaged-{case}"), choice, &files)?;
        }
    }
    Ok(())
}

/// Slots with the highest sequence but one.
fn without_next(choice: u8, files: &Files) -> Vec<u8> {
    const SEQUENCE: usize = 12;
    with_pieces(choice, files, |_, piece| {
        if piece.starts_with(b"BFRYSLT\0") {
            piece[SEQUENCE..][..8].copy_from_slice(&(u64::MAX - 1).to_le_bytes());
        }
    })
}

/// Records that each say that they were durable, but the last one's pages are gone.
fn durable_and_cut(choice: u8, files: &Files) -> Vec<u8> {
    const SEQUENCE: usize = 32;
    const DURABLE: usize = 72;
    let mut last = 0;
    let seed = with_pieces(choice, files, |_, piece| {
        last = piece.len();
        if piece.starts_with(b"BFRYREC\0") {
            piece.copy_within(SEQUENCE..SEQUENCE + 8, DURABLE);
        }
    });
    seed[..seed.len() - last - 4].to_vec()
}

/// Records that follow nothing.
fn unchained(choice: u8, files: &Files) -> Vec<u8> {
    const PREVIOUS: usize = 40;
    with_pieces(choice, files, |kind, piece| {
        if piece.starts_with(b"BFRYREC\0") {
            *kind &= !CHAINED;
            piece[PREVIOUS] ^= 1;
        }
    })
}

/// A seed whose pieces are changed, each with its kind; checksums and chain values follow.
fn with_pieces(choice: u8, files: &Files, mut change: impl FnMut(&mut u8, &mut [u8])) -> Vec<u8> {
    let mut seed = [&[choice], &pack(files)[..]].concat();
    let mut at = 1;
    while let Some(&[_, _, low, high]) = seed.get(at..at + 4).and_then(<[u8]>::first_chunk) {
        let length = usize::from(u16::from_le_bytes([low, high]));
        let (head, bytes) = seed[at..at + 4 + length].split_at_mut(4);
        change(&mut head[0], bytes);
        at += 4 + length;
    }
    seed
}

/// Damage, by the scene that it befell.
const DAMAGED: [(&str, &[&str]); 5] = [
    (
        "applied",
        &["state-version-2", "both-slots", "newer-slot", "pre-image"],
    ),
    ("staged", &["log-version-2", "torn-record"]),
    (
        "committed",
        &[
            "header-of-decided",
            "record-of-decided",
            "one-decision-copy",
        ],
    ),
    ("compressed", &["end-of-decided"]),
    ("member", &["one-group-copy"]),
];

fn files_in(scene: &Path) -> Files {
    let mut files = FILES.map(|name| fs::read(scene.join(name)).ok());
    if let Some(state) = &mut files[STATE] {
        state.resize(STATE_PAGES * PAGE, 0);
    }
    files
}

/// A story: what is done to a replica, and what it is about.
struct Story {
    name: &'static str,
    setup: Setup,
    live: fn(&Setup, &World) -> Result<()>,
}

/// A disk with the state, and the target.
struct World {
    disk: SimDisk,
    device: Option<Arc<MemoryDevice>>,
}

impl World {
    fn new(setup: &Setup) -> Self {
        let disk = SimDisk::new(SimOptions::default());
        // The order of `Machine`: files are identified by it.
        if !setup.device {
            disk.install_sparse("images", TARGET, &image("abc."));
        }
        drop(disk.dir("state"));
        let device = setup.device.then(|| device(image("abc.")));
        Self { disk, device }
    }

    fn open(&self, setup: &Setup) -> Result<Replica> {
        let place = match &self.device {
            Some(device) => Place::Device(Arc::clone(device) as Arc<_>),
            None => setup.place(&self.disk),
        };
        let groups = self.groups();
        Replica::open(place, self.disk.dir("state"), Some(&groups), &quiet)
    }

    fn groups(&self) -> GroupDirectory {
        GroupDirectory::new(self.disk.dir("state"))
    }
}

/// The disk after every flush of every story, where it differs from what was seen before.
fn stories(seeds: &Seeds) -> std::io::Result<()> {
    let redo = Setup::device(Strategy::Redo);
    let all = [
        Story {
            name: "resumed",
            setup: redo,
            live: resumed,
        },
        Story {
            name: "compacted",
            setup: redo,
            live: compacted,
        },
        Story {
            name: "frames",
            setup: Setup {
                frames: true,
                ..redo
            },
            live: resumed,
        },
        Story {
            name: "back",
            setup: redo,
            live: back,
        },
        Story {
            name: "accepted",
            setup: redo,
            live: accepted,
        },
        Story {
            name: "cancelled",
            setup: redo,
            live: cancelled,
        },
        Story {
            name: "group",
            setup: redo,
            live: group,
        },
        Story {
            name: "direct",
            setup: Setup::device(Strategy::Direct).without_undo(),
            live: accepted,
        },
        Story {
            name: "file",
            setup: Setup::file(Strategy::Redo),
            live: back,
        },
        Story {
            name: "clone",
            setup: Setup::file(Strategy::Clone),
            live: back,
        },
        Story {
            name: "shadow",
            setup: Setup::file(Strategy::Shadow),
            live: resumed,
        },
    ];
    let mut seen = BTreeSet::new();
    for story in all {
        let world = World::new(&story.setup);
        world.disk.record();
        (story.live)(&story.setup, &world).expect("nothing fails");
        for (number, boundary) in world.disk.take_trace().into_iter().enumerate() {
            let durable = [OperationKind::Flush, OperationKind::SyncDirectory];
            let is_flush = boundary
                .operation
                .is_some_and(|o| durable.contains(&o.kind));
            let disk = boundary.snapshot.after_kill();
            let mut files = FILES.map(|name| disk.content(&format!("state/{name}")));
            for file in files.iter_mut().flatten() {
                file.resize(file.len().next_multiple_of(PAGE), 0);
            }
            if !is_flush || !seen.insert(pack(&files)) {
                continue;
            }
            let next = u8::try_from(seen.len() % usize::from(NEXT)).expect("it is small");
            let choice = choice(!story.setup.device, number % 3 == 2, next);
            seeds.write_files(&format!("{}-{number}", story.name), choice, &files)?;
        }
    }
    Ok(())
}

fn new() -> Vec<u8> {
    image("aB.D")
}

fn begin<'r>(setup: &Setup, replica: &'r mut Replica) -> Result<Session<'r>> {
    replica.begin(&setup.plan(SESSION, &new()))
}

/// Two runs, and so two segments.
fn resumed(setup: &Setup, world: &World) -> Result<()> {
    staged(setup, world)?;
    let mut replica = world.open(setup)?;
    let target = replica.target();
    let mut session = replica.resume(u64::MAX)?;
    setup.finish(&mut session, target.as_ref(), &new())?;
    session.commit(root(&new()), &quiet).map(drop)
}

/// One group of records.
fn staged(setup: &Setup, world: &World) -> Result<()> {
    let mut replica = world.open(setup)?;
    let target = replica.target();
    let mut session = begin(setup, &mut replica)?;
    setup.stage(&mut session, target.as_ref(), &new(), 1, &mut |_| {})
}

/// A page rots in the log before it is read back, so what is sound goes to another segment.
fn compacted(setup: &Setup, world: &World) -> Result<()> {
    let mut replica = world.open(setup)?;
    let target = replica.target();
    let mut session = begin(setup, &mut replica)?;
    setup.stage(
        &mut session,
        target.as_ref(),
        &new(),
        usize::MAX,
        &mut |_| {},
    )?;
    let first_payload = 2 * PAGE as u64;
    let log = format!("state/{}", FILES[1]);
    world.disk.flip_bit(&log, first_payload);
    drop(session.prepare()?);
    setup.finish(&mut session, target.as_ref(), &new())?;
    session.commit(root(&new()), &quiet).map(drop)
}

fn back(setup: &Setup, world: &World) -> Result<()> {
    let mut replica = world.open(setup)?;
    setup.sync(&mut replica, SESSION, &new())?;
    replica.rollback(&quiet).map(drop)
}

fn accepted(setup: &Setup, world: &World) -> Result<()> {
    let mut replica = world.open(setup)?;
    setup.sync(&mut replica, SESSION, &new())?;
    replica.accept().map(drop)
}

fn cancelled(setup: &Setup, world: &World) -> Result<()> {
    staged(setup, world)?;
    world.open(setup)?.cancel().map(drop)
}

/// A member of a group that is committed after it is found prepared.
fn group(setup: &Setup, world: &World) -> Result<()> {
    let mut replica = world.open(setup)?;
    let target = replica.target();
    let mut session = begin(setup, &mut replica)?;
    setup.finish(&mut session, target.as_ref(), &new())?;
    session.prepare_for_group(root(&new()), GROUP)?;
    let member = SessionId::from_bytes([SESSION; 16]);
    let committed = world.groups().commit(GROUP, &[member])?;
    session.commit_in_group(root(&new()), &committed, &quiet)?;
    world.groups().retire(GROUP)
}

/// Bytes of every kind of field, and a frame, as `codec` reads them.
fn fields() -> [(&'static str, Vec<u8>); 2] {
    let frame = frame::pack(&image("a"), 1).expect("there is memory");
    // No fields, a limit of 256 times 16 bytes, and the frame of as many.
    let framed = [&[0, 0, 1][..], &frame].concat();
    let mut all = Vec::new();
    for kind in 0..10u32 {
        all.push(1);
        all.extend(variant(kind, 10));
        all.extend([3; 40]);
    }
    [("frame", framed), ("fields", all)]
}

/// How `arbitrary` finds a variant of an enum in bytes.
fn variant(number: u32, of: u32) -> [u8; 4] {
    let first = (u64::from(number) << 32).div_ceil(of.into());
    u32::try_from(first).expect("below 2^32").to_le_bytes()
}

const OPERATIONS: u32 = 6;
const CUTS: u32 = 4;
const SYNC: u32 = 0;
const STAGE: u32 = 1;
const CANCEL: u32 = 4;
const ROLLBACK: u32 = 2;
const ACCEPT: u32 = 3;
const REOPEN: u32 = 5;
const POWER_LOSS: u32 = 1;
const NO_SPACE: u32 = 3;

/// Lives of every kind of target as `operations` reads them: a way there, cut late, and a way back.
fn lives() -> Vec<(String, Vec<u8>)> {
    let mut lives = Vec::new();
    for kind in 0..4u8 {
        for options in 0..8u8 {
            let cut = Some((4 + 5 * options, POWER_LOSS, 3 * options));
            let steps = [
                step(SYNC, &[1], None, None),
                step(STAGE, &[2, 1], cut, None),
                step(SYNC, &[2], cut, Some((options, NO_SPACE, 0))),
                step(ROLLBACK, &[], None, None),
                step(SYNC, &[0], None, None),
                step(
                    if options % 2 == 0 { ACCEPT } else { REOPEN },
                    &[],
                    cut,
                    None,
                ),
            ];
            let images = [[1, 2, 3, 0], [1, 4, 0, 5], [6, 2, 3, 7]].concat();
            let shorter = [0, 0, 0, 16, 0, 9].map(|b: u8| b * (options & 1));
            let head = [&[kind, options][..], &images, &shorter].concat();
            lives.push((
                format!("life-{kind}-{options}"),
                [head, steps.concat()].concat(),
            ));
        }
    }
    // Power is lost soon after a session begins, at another moment each time.
    for kind in 0..4u8 {
        for first in 0..4u8 {
            let losses = (0..5u8).map(|n| Some((6 + first + 4 * n, POWER_LOSS, n % 2)));
            let steps = losses.flat_map(|cut| {
                [
                    step(STAGE, &[1 + first % 2, 3], cut, None),
                    step(CANCEL, &[], None, None),
                ]
            });
            let images = [[1, 2, 3, 0], [1, 4, 0, 5], [6, 2, 3, 7]].concat();
            let head = [&[kind, 0][..], &images, &[0; 6][..]].concat();
            let steps: Vec<u8> = steps.flatten().collect();
            lives.push((format!("early-{kind}-{first}"), [head, steps].concat()));
        }
    }
    lives
}

type Cut = Option<(u8, u32, u8)>;

fn step(operation: u32, parameters: &[u8], cut: Cut, again: Cut) -> Vec<u8> {
    let mut bytes = vec![1];
    bytes.extend(variant(operation, OPERATIONS));
    bytes.extend(parameters);
    for cut in [cut, again] {
        bytes.push(u8::from(cut.is_some()));
        if let Some((after, kind, which)) = cut {
            bytes.push(after);
            bytes.extend(variant(kind, CUTS));
            if kind == POWER_LOSS {
                bytes.push(which);
            }
        }
    }
    bytes
}

/// A few bytes from a seed of their own, the same on every run.
fn noise(seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..200).map(step).collect()
}

fn files_of(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let below = |path: PathBuf| {
        if path.is_dir() {
            files_of(&path)
        } else {
            Ok(vec![path])
        }
    };
    let found: std::io::Result<Vec<_>> = entries(directory)?.into_iter().map(below).collect();
    Ok(found?.concat())
}

fn directories_of(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let found = entries(directory)?.into_iter().filter(|path| path.is_dir());
    Ok(found.filter(|path| !path.ends_with("damaged")).collect())
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().expect("it is listed");
    name.to_string_lossy().into_owned()
}

fn entries(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)?
        .map(|e| e.map(|e| e.path()))
        .collect::<std::io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}
