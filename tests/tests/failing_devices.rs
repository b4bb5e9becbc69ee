//! A block device of the real kernel that answers with EIO on demand: nbdkit's error filter, as a file by nbdfuse, under
//! a loop device. What a run does then is judged by the file behind all of that, which is the medium.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::lab::{Answer, Lab, LoopDevice, MIB, same, skipped, tool, with_files};

/// A loop device above a disk that fails while a file named `fail` exists; gone when dropped.
struct FailingDevice {
    /// Taken first: what lies below cannot be unmounted before.
    device: Option<LoopDevice>,
    mount: String,
    lab: Lab,
}

impl FailingDevice {
    /// `None` where it is not to be had: not root, no nbdkit or no nbdfuse. `fault` is an option of the error filter.
    fn make(fault: &str, content: &[u8]) -> Option<Self> {
        let lab = Lab::new();
        lab.write("disk", content);
        fs::create_dir(lab.path("mount")).ok()?;
        tool(&["nbdkit", "--version"])?;
        tool(&["nbdfuse", "--version"])?;
        let [disk, fail, mount] =
            ["disk", "fail", "mount"].map(|n| lab.path(n).display().to_string());
        let served = format!("nbdkit -s --filter=error file {disk} {fault} error-file={fail}");
        // In the background, with nothing of ours open: it ends when it is unmounted.
        let line = format!("nbdfuse {mount} --command {served} >/dev/null 2>&1 </dev/null &");
        tool(&["sh", "-c", &line])?;
        let mut made = Self {
            device: None,
            mount,
            lab,
        };
        let image = made.lab.path("mount/nbd");
        for _ in 0..100 {
            if image.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        made.device = Some(LoopDevice::attach(&image, 512)?);
        Some(made)
    }

    fn path(&self) -> &str {
        self.device.as_ref().expect("attached").path()
    }

    fn fail(&self) {
        with_files(|| File::create(self.lab.path("fail"))).expect("created");
    }

    fn recover(&self) {
        fs::remove_file(self.lab.path("fail")).expect("it was failing");
    }

    fn holds(&self, content: &[u8]) -> bool {
        same(&self.lab.path("disk"), content)
    }
}

impl Drop for FailingDevice {
    fn drop(&mut self) {
        drop(self.device.take());
        // The kernel lets go of what lies under a loop device a moment after it was detached.
        for _ in 0..100 {
            if tool(&["umount", &self.mount]).is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// When the device begins to fail.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Before the run, of which only some requests are concerned.
    Start,
    /// When a part of the new image is durable.
    Checkpoint,
}

/// Options of the error filter, and when they begin to count.
const FAULTS: [(&str, Moment); 4] = [
    ("error-rate=100%", Moment::Checkpoint),
    ("error-pread-rate=100%", Moment::Checkpoint),
    ("error-pwrite-rate=100%", Moment::Start),
    ("error-pwrite-rate=20%", Moment::Start),
];

fn run_failing(device: &FailingDevice, line: &str, moment: Moment) -> Answer {
    match moment {
        Moment::Start => {
            device.fail();
            device.lab.run(line)
        }
        Moment::Checkpoint => {
            let mut run = device.lab.start(&format!("{line} --bwlimit 12M"));
            let begun = run.wait_for(|line: &Value| line["event"] == "checkpoint");
            device.fail();
            let answer = run.finish();
            assert!(begun, "it ended before anything was durable: {answer:#?}");
            answer
        }
    }
}

fn survives_a_failing_device(name: &str, arguments: &str) {
    for (fault, moment) in FAULTS {
        let old = blockferry_testkit::images::sparse_image(81, 16 * MIB, 0.5);
        let Some(device) = FailingDevice::make(fault, &old) else {
            return skipped(name, "root, losetup, nbdkit and nbdfuse");
        };
        let new = device.lab.edited("new", 82, &old, 0.8);
        let target = device.path().to_owned();
        let line = format!("sync new {target} --mode delta {arguments} --threads 1");

        let answer = run_failing(&device, &line, moment);
        device.recover();

        let case = format!("{fault} at {moment:?}: {answer:#?}");
        let status = device.lab.must(&format!("status {target}"));
        match (
            answer.code,
            status.summary()["state"].as_str().expect("a state"),
        ) {
            (Some(0), "applied" | "at") => assert!(device.holds(&new), "{case}"),
            (Some(2..=7), "unknown" | "staging" | "at") => assert!(device.holds(&old), "{case}"),
            (Some(2..=7), "committed" | "rolling_back") => {}
            (Some(2..=7), "incomplete") => assert!(arguments.contains("--in-place"), "{case}"),
            (_, state) => panic!("{state}: {case}"),
        }
        if answer.code != Some(0) {
            let complaint = answer.complaint();
            let says = complaint.contains("Input/output error") && complaint.contains(&target);
            assert!(says, "not what failed and where: {case}");
        }
        device.lab.must(&line);
        assert!(device.holds(&new), "the next run did not end equal: {case}");
        if !arguments.contains("--in-place") {
            device.lab.must(&format!("rollback {target}"));
            assert!(device.holds(&old), "not the old point: {case}");
        }
        report(name, fault, &answer, Path::new(&target));
    }
}

#[expect(
    clippy::print_stderr,
    reason = "what was felt of the failure makes the test credible"
)]
fn report(name: &str, fault: &str, answer: &Answer, target: &Path) {
    eprintln!(
        "{name}: {fault} of {}: exit {:?}",
        target.display(),
        answer.code
    );
}

#[test]
fn a_failing_device_ends_old_or_new_and_the_next_run_ends_equal() {
    let name = "a_failing_device_ends_old_or_new_and_the_next_run_ends_equal";
    survives_a_failing_device(name, "--strategy redo");
}

#[test]
fn a_failing_device_written_in_place_is_known_incomplete_and_goes_on() {
    let name = "a_failing_device_written_in_place_is_known_incomplete_and_goes_on";
    survives_a_failing_device(name, "--in-place");
}
