//! QMP servers and guest agents that lie, flood, stall and go away; and freezes that end in time whatever happens.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockferry_device::Quiesce;
use blockferry_qemu::freeze::{Guarded, GuestFreezer, guard};
use blockferry_qemu::{Agent, Qmp};
use serde_json::{Value, json};

const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;
const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

/// Serves one client by a script.
struct Scripted {
    place: tempfile::TempDir,
    _thread: JoinHandle<()>,
}

impl Scripted {
    fn new(script: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let place = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(place.path().join("s")).expect("bound");
        let thread = thread::spawn(move || script(listener.accept().expect("a client").0));
        Self {
            place,
            _thread: thread,
        }
    }

    fn socket(&self) -> PathBuf {
        self.place.path().join("s")
    }

    /// A QMP server that answers the negotiation, and then each line with what `answer` makes of it.
    fn qmp(mut answer: impl FnMut(&Value) -> Vec<u8> + Send + 'static) -> Self {
        Self::new(move |mut stream| {
            writeln!(stream, "{GREETING}").expect("heard");
            let reader = BufReader::new(stream.try_clone().expect("cloned"));
            for line in reader.lines().map_while(Result::ok) {
                let request: Value = serde_json::from_str(&line).expect("JSON");
                let said = if request["execute"] == "qmp_capabilities" {
                    format!("{}\n", json!({"return": {}, "id": request["id"]})).into_bytes()
                } else {
                    answer(&request)
                };
                if stream.write_all(&said).is_err() {
                    return;
                }
            }
        })
    }
}

fn execute(answer: impl FnMut(&Value) -> Vec<u8> + Send + 'static) -> Result<Value, String> {
    let server = Scripted::qmp(answer);
    let mut qmp = Qmp::connect(&server.socket()).map_err(|error| error.to_string())?;
    let done = qmp.execute("query-jobs", json!({}));
    done.map_err(|error| error.to_string())
}

#[test]
fn answers_are_told_from_events_and_refusals_keep_their_words() {
    let answer = execute(|request| {
        let event = json!({"event": "RESUME", "timestamp": {}});
        format!(
            "{event}\n\r\n{}\n",
            json!({"return": [1], "id": request["id"]})
        )
        .into_bytes()
    });
    assert_eq!(answer, Ok(json!([1])));

    let refused = execute(|request| {
        let said = "no \u{1b}[31msuch job";
        let error = json!({"class": "GenericError", "desc": said});
        format!("{}\n", json!({"error": error, "id": request["id"]})).into_bytes()
    });

    let refused = refused.expect_err("refused");
    assert!(
        refused.contains("query-jobs") && refused.contains("such job"),
        "{refused}"
    );
    assert!(!refused.contains('\u{1b}'), "{refused:?}");
}

#[test]
fn lies_are_errors_that_say_what_was_expected() {
    type Lie = fn(&Value) -> Vec<u8>;
    let lies: [(&str, Lie); 6] = [
        ("expected a JSON value", |_| b"nonsense\n".to_vec()),
        ("expected a JSON value", |_| {
            vec![0x80, 0xFF, 0x00, b'{', b'\n']
        }),
        ("expected the answer to request", |_| {
            b"{\"return\": 1, \"id\": 99}\n".to_vec()
        }),
        ("expected the answer to request", |_| {
            b"{\"return\": 1}\n".to_vec()
        }),
        ("expected the answer to request", |_| b"[]\n".to_vec()),
        ("expected a JSON value", |_| {
            let mut deep = vec![b'['; 100_000];
            deep.push(b'\n');
            deep
        }),
    ];
    for (said, lie) in lies {
        let error = execute(lie).expect_err(said);
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn a_line_without_end_is_cut_off_at_its_limit() {
    let server = Scripted::new(|mut stream| {
        let noise = vec![b'x'; 1 << 20];
        while stream.write_all(&noise).is_ok() {}
    });

    let error = Qmp::connect(&server.socket()).expect_err("no greeting");

    assert!(error.to_string().contains("at most"), "{error}");
}

#[test]
fn who_goes_away_or_is_somebody_else_is_named() {
    let gone = Scripted::new(drop);
    let error = Qmp::connect(&gone.socket()).expect_err("nobody");
    assert!(
        error.to_string().contains("closed the connection"),
        "{error}"
    );

    let other = Scripted::new(|mut stream| stream.write_all(b"{\"hello\": 1}\n").expect("heard"));
    let error = Qmp::connect(&other.socket()).expect_err("something else");
    assert!(error.to_string().contains("greeting of QMP"), "{error}");
}

#[test]
fn a_connection_that_missed_an_answer_is_not_used_again() {
    let server = Scripted::qmp(|_| b"nonsense\n".to_vec());
    let mut qmp = Qmp::connect(&server.socket()).expect("QMP");
    qmp.execute("a", json!({})).expect_err("nonsense");

    let error = qmp.execute("b", json!({})).expect_err("broken");

    assert!(error.to_string().contains("failed before"), "{error}");
}

#[test]
fn a_flood_of_events_keeps_the_newest_and_an_event_is_waited_for_no_longer_than_asked() {
    let server = Scripted::qmp(|request| {
        let mut said = Vec::new();
        for number in 0..5000 {
            let event = json!({"event": "TICK", "data": {"n": number}});
            said.extend(format!("{event}\n").into_bytes());
        }
        said.extend(format!("{}\n", json!({"return": 1, "id": request["id"]})).into_bytes());
        said
    });
    let mut qmp = Qmp::connect(&server.socket()).expect("QMP");
    qmp.execute("x", json!({})).expect("answered");

    let newest = qmp.wait_event(SHORT, |event| event.data["n"] == 4999);
    assert_eq!(newest.expect("kept").name, "TICK");
    let began = Instant::now();
    let error = qmp.wait_event(SHORT, |_| true).expect_err("no more");
    assert!(error.to_string().contains("in time"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// What a guest's agent was asked, with the time of each since it began.
type Asked = Arc<Mutex<Vec<(String, Duration)>>>;

/// An agent that begins to listen after some requests, freezes and thaws. `refuses` fails that command.
fn agent(deaf_for: usize, refuses: Option<&'static str>) -> (Scripted, Asked) {
    let asked = Asked::default();
    let noting = Arc::clone(&asked);
    let server = Scripted::new(move |mut stream| {
        let began = Instant::now();
        let reader = BufReader::new(stream.try_clone().expect("cloned"));
        let mut heard = 0;
        for line in reader.split(b'\n').map_while(Result::ok) {
            heard += 1;
            if heard <= deaf_for {
                continue;
            }
            let start = line.iter().rposition(|b| *b == 0xFF).map_or(0, |at| at + 1);
            let request: Value = serde_json::from_slice(&line[start..]).expect("JSON");
            let command = request["execute"].as_str().expect("a command").to_owned();
            let answer = match command.as_str() {
                "guest-sync-delimited" => json!({"return": request["arguments"]["id"]}),
                name if Some(name) == refuses => json!({"error": {"desc": "the guest is busy"}}),
                "guest-fsfreeze-status" => json!({"return": "thawed"}),
                _ => json!({"return": 2}),
            };
            noting
                .lock()
                .expect("no panic")
                .push((command, began.elapsed()));
            let mut said = vec![0xFF];
            said.extend(format!("{answer}\n").into_bytes());
            if stream.write_all(&said).is_err() {
                return;
            }
        }
    });
    (server, asked)
}

fn commands(asked: &Asked) -> Vec<String> {
    let asked = asked.lock().expect("no panic");
    let all = asked.iter().map(|(command, _)| command.clone());
    all.filter(|command| command != "guest-sync-delimited")
        .collect()
}

#[test]
fn an_agent_is_spoken_to_once_it_listens_and_given_up_if_it_never_does() {
    let (server, _) = agent(2, None);
    let mut found = Agent::connect(&server.socket(), LONG).expect("it listens at last");
    assert_eq!(found.freeze(LONG).expect("frozen"), 2);
    assert!(!found.is_frozen(LONG).expect("asked"));

    let (server, _) = agent(usize::MAX, None);
    let error = Agent::connect(&server.socket(), SHORT).expect_err("it never listens");
    assert!(error.to_string().contains("qemu-guest-agent"), "{error}");
}

#[test]
fn a_guest_is_thawed_when_told_when_whoever_froze_it_is_gone_and_at_the_deadline() {
    // Told, or gone: the guard's input says something, or ends.
    for told in [&b"x"[..], b""] {
        let (server, asked) = agent(0, None);
        let mut said = Vec::new();

        guard(&mut guest(&server.socket()), LONG, told, &mut said).expect("thawed");

        assert_thawed(&said);
        let expected = ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];
        assert_eq!(commands(&asked), expected);
    }

    // Nobody says anything.
    let (server, asked) = agent(0, None);
    let (silent, _kept) = UnixStream::pair().expect("a pair");
    let mut said = Vec::new();
    guard(&mut guest(&server.socket()), SHORT, silent, &mut said).expect("thawed");
    assert_eq!(said, b"frozen file-system-consistent\nlate\n");
    let asked = asked.lock().expect("no panic");
    let [.., (_, frozen), (_, thawed)] = asked.as_slice() else {
        panic!("{asked:?}");
    };
    let held = *thawed - *frozen;
    assert!(
        held >= SHORT && held < SHORT + Duration::from_secs(2),
        "{held:?}"
    );
}

#[test]
fn a_guest_that_could_not_be_frozen_is_thawed_all_the_same() {
    let (server, asked) = agent(0, Some("guest-fsfreeze-freeze"));
    let mut said = Vec::new();

    let error = guard(
        &mut guest(&server.socket()),
        LONG,
        std::io::empty(),
        &mut said,
    )
    .expect_err("refused");

    assert!(error.to_string().contains("busy"), "{error}");
    let said = String::from_utf8(said).expect("text");
    assert_eq!(said, format!("failed: {error}\n"));
    let expected = ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];
    assert_eq!(commands(&asked), expected);
}

fn guest(agent: &Path) -> GuestFreezer {
    GuestFreezer::connect(agent).expect("an agent")
}

#[track_caller]
fn assert_thawed(said: &[u8]) {
    let said = String::from_utf8_lossy(said);
    let held_up = said.strip_prefix("frozen file-system-consistent\nthawed ");
    let ms = held_up.and_then(|ms| ms.trim_end().parse::<u64>().ok());
    assert!(ms.is_some(), "{said}");
}

/// A guard in another process, as it would speak.
fn shell(script: &str) -> Guarded {
    let words = ["sh", "-c", script, "guard"];
    Guarded::new(words.map(OsString::from).to_vec())
}

#[test]
fn a_freeze_through_another_process_ends_with_it_and_a_late_thaw_is_an_error() {
    let guarded = shell("echo frozen file-system-consistent; read x; echo thawed 87");
    guarded.freeze(LONG).expect("frozen");
    let again = guarded.freeze(LONG).expect_err("twice");
    assert!(again.to_string().contains("already"), "{again}");
    let thawed = guarded.thaw_telling().expect("in time");
    assert_eq!(thawed.held_up, Duration::from_millis(87));
    guarded.thaw().expect("nothing is frozen any more");

    let late = shell("echo frozen file-system-consistent; sleep 0.1; echo late");
    late.freeze(Duration::from_millis(50)).expect("frozen");
    thread::sleep(Duration::from_millis(200));
    let error = late.thaw().expect_err("late");
    assert!(error.to_string().contains("deadline"), "{error}");

    for script in [
        "exit 3",
        "echo hello",
        "echo frozen file-system-consistent; exec 1>&-; sleep 0.1",
        "echo frozen file-system-consistent; echo thawed",
        "echo frozen file-system-consistent; echo thawed soon",
    ] {
        let broken = shell(script);
        let outcome = broken.freeze(LONG).and_then(|()| broken.thaw());
        outcome.expect_err(script);
    }
    let missing = Guarded::new(vec!["/no/such/guard".into()]);
    missing.freeze(LONG).expect_err("no guard");
}

#[test]
fn a_guest_that_stands_still_is_left_frozen_and_its_guard_ends_at_once() {
    let place = tempfile::tempdir().expect("a directory");
    let thawing = place.path().join("thawing");
    // As a guard whose agent does not answer any more.
    let script = format!(
        "echo frozen file-system-consistent; read x; touch {}; sleep 100",
        thawing.display()
    );
    let guarded = shell(&script);
    guarded.freeze(LONG).expect("frozen");
    let began = Instant::now();

    guarded.leave_frozen();

    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    thread::sleep(Duration::from_millis(50));
    assert!(!thawing.exists(), "it began to thaw");
}

#[test]
fn whoever_froze_a_guest_and_died_is_seen_at_the_end_of_the_guards_input() {
    let (server, asked) = agent(0, None);
    let (input, ours) = UnixStream::pair().expect("a pair");
    let socket = server.socket();
    let guarding = thread::spawn(move || {
        let mut said = Vec::new();
        guard(&mut guest(&socket), LONG, input, &mut said).map(|()| said)
    });
    while commands(&asked).is_empty() {
        thread::sleep(Duration::from_millis(5));
    }

    drop(ours);

    let said = guarding.join().expect("no panic").expect("thawed");
    assert_thawed(&said);
}
