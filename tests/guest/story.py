"""A real guest comes over while it works, is rolled back, comes over again, is committed and comes home.

    story.py BLOCKFERRY [DIR]                    the whole story; ends with 1 if anything did not hold
    story.py hook start|stop SITE IMAGES         what the job runs to start and stop a machine at a site

The workload in the guest checks its own data whenever it starts, and tells the host what was durable before it went on.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOOTING = 180
DISKS = ["root", "data"]


class Broken(Exception):
    """Something did not hold."""


def machine(site, images, disks, waits):
    """The command line of a machine with two disks, each (driver, path), whose files are in `site`; with what makes it wait."""
    line = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "512"]
    line += ["-nodefaults", "-display", "none", "-serial", f"file:{site}/console", "-daemonize", "-pidfile", f"{site}/pid"]
    # A freeze waits for three grace periods of RCU for each file system: 20 ms each in an idle kernel, unless they are expedited.
    kernel = "root=/dev/vda rw console=ttyS0 quiet rcupdate.rcu_expedited=1"
    line += ["-kernel", f"{images}/vmlinuz", "-initrd", f"{images}/initrd", "-append", kernel]
    for name in ["qmp", "own"]:
        line += ["-qmp", f"unix:{site}/{name},server=on,wait=off"]
    for number, (driver, path) in enumerate(disks):
        node = {"driver": driver, "node-name": f"disk{number}", "discard": "unmap",
                "file": {"driver": "file", "filename": str(path), "discard": "unmap"}}
        line += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive=disk{number}"]
    line += ["-device", "virtio-serial", "-chardev", f"socket,path={site}/agent,server=on,wait=off,id=agent"]
    line += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    for name in ["told", "beats"]:
        line += ["-chardev", f"file,path={site}/{name},append=on,id={name}", "-device", f"virtserialport,chardev={name},name={name}"]
    return line + waits


def pid_of(site):
    try:
        pid = int((site / "pid").read_text())
        os.kill(pid, 0)
        return pid
    except (OSError, ValueError):
        return None


def command(site, name):
    """One command of QMP, through the socket that blockferry does not use."""
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.connect(str(site / "own"))
        lines = qmp.makefile("rw")
        lines.readline()
        for wanted in ["qmp_capabilities", name]:
            lines.write(json.dumps({"execute": wanted}) + "\n")
            lines.flush()
            while "return" not in (answer := json.loads(lines.readline())):
                if "error" in answer:
                    raise Broken(f"{name}: {answer}")
        return answer["return"]


def start(site, images, disks, waits=()):
    subprocess.run(machine(site, images, disks, list(waits)), check=True)


def stop(site):
    """Shuts the guest down; ends the machine if that takes too long."""
    pid = pid_of(site)
    if pid is None:
        return
    end = time.monotonic() + 60
    while pid_of(site) and time.monotonic() < end:
        try:
            command(site, "system_powerdown")
        except (OSError, ValueError):
            pass
        time.sleep(1)
    if pid_of(site):
        os.kill(pid, signal.SIGKILL)
    (site / "pid").unlink(missing_ok=True)


def hook(verb, site, images):
    site = Path(site)
    stop(site)
    if verb == "stop":
        return
    disks, on_trial = [], True
    for number in range(len(DISKS)):
        overlay = os.environ.get(f"BLOCKFERRY_DISK_{number}_OVERLAY")
        on_trial = overlay is not None
        disks.append(("qcow2", overlay) if overlay else ("raw", os.environ[f"BLOCKFERRY_DISK_{number}_TARGET"]))
    if os.environ.get("BLOCKFERRY_HAND_OVER") == "warm":
        return start(site, images, disks, ["-incoming", "defer"])
    # Committed, it is let go once what it writes is recorded.
    start(site, images, disks, [] if on_trial else ["-S"])


class Told:
    """What the workload of a site tells on a port, with the time at which it was seen."""

    def __init__(self, site, port):
        self.path, self.lines, self.ended = site / port, [], False
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        while not self.path.exists():
            time.sleep(0.01)
        with open(self.path) as file:
            rest = ""
            while not self.ended:
                rest += file.readline()
                if rest.endswith("\n"):
                    self.lines.append((time.monotonic(), rest.split()))
                    rest = ""
                else:
                    time.sleep(0.005)

    def wait(self, word, after, seconds=BOOTING):
        """The first line that begins with `word` behind the first `after` lines."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for at, line in self.lines[after:]:
                if line[0] == "wrong":
                    raise Broken("the guest says: " + " ".join(line))
                if line[0] == word:
                    return at, line
            time.sleep(0.01)
        raise Broken(f"the guest did not say {word!r} within {seconds} s")

    def pace(self, word):
        """Seconds between two such lines, as long as nothing holds them up: the median of the last hundred."""
        wrote = [at for at, line in self.lines[-100:] if line[0] == word]
        return statistics.median(later - earlier for earlier, later in zip(wrote, wrote[1:]))

    def last(self):
        """Time and number of the last write that was acknowledged."""
        wrote = [(at, int(line[1])) for at, line in self.lines if line[0] == "wrote"]
        return wrote[-1] if wrote else (0.0, 0)


class Story:
    def __init__(self, program, place):
        self.program, self.place = program, place
        self.home, self.away = place / "home", place / "away"
        for site in (self.home, self.away):
            site.mkdir()
        self.told, self.beats = {}, {}
        self.points, self.gaps = [], []
        self.environment = dict(os.environ, BLOCKFERRY_STATE_ROOT=str(place / "state"))

    def say(self, text):
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def run(self, *arguments):
        """A command of blockferry; returns its JSON lines."""
        done = subprocess.run([self.program, "--json", *arguments], env=self.environment, text=True, capture_output=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode != 0:
            raise Broken(f"blockferry {' '.join(arguments)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        for line in lines:
            if line.get("event") == "pass":
                self.say(f"  pass {line['number']}: {line['changed_bytes'] / 1e6:.1f} MB changed, {line['seconds']:.2f} s, "
                         f"{line['consistency']}, writes held up for {line['held_up_seconds'] * 1000:.0f} ms")
                if line["consistency"] == "file-system-consistent":
                    self.points.append(line["held_up_seconds"])
            if line.get("type") == "warning":
                self.say(f"  warning: {line['message']}")
        return lines

    def images(self):
        subprocess.run([HERE / "image", self.place], check=True)
        for number, disk in enumerate(DISKS):
            shutil.copyfile(self.place / f"{disk}.raw", self.away / f"disk{number}")
            os.rename(self.place / f"{disk}.raw", self.home / f"disk{number}")
            # What the replica was before the job.
            shutil.copyfile(self.away / f"disk{number}", self.place / f"before{number}")

    def describe(self, hand_over, quiesce="freeze-and-stop"):
        def section(site, prefix, other):
            lines = [f"[{prefix}machine]", f'qmp = "{site}/qmp"', f'agent = "{site}/agent"', f'quiesce = "{quiesce}"']
            for number in range(len(DISKS)):
                lines += [f"[[{prefix}disk]]", f'node = "disk{number}"', f'target = "{other}/disk{number}"']
            hooks = [f'{verb}-target = ["{sys.executable}", "{HERE}/story.py", "hook", "{verb}", "{other}", "{self.place}"]'
                     for verb in ("start", "stop")]
            return lines + [f"[{prefix}hooks]", *hooks]

        job = ['name = "guest"', 'downtime-budget = "5s"', 'refresh = "2s"', f'hand-over = "{hand_over}"']
        job += section(self.home, "", self.away) + section(self.away, "reverse.", self.home)
        (self.place / "guest.toml").write_text("\n".join(job) + "\n")

    def cut_over(self, source, replica):
        """Cuts over; every write that was acknowledged on the source is on the replica. Returns the pause."""
        told = self.told[replica]
        before = len(told.lines)
        lines = self.run("failover", "complete", "guest")
        pause = lines[-1]["downtime_seconds"]
        stopped_at, acknowledged = self.told[source].last()
        at, (_, root, data, _) = told.wait("checked", before)
        self.expect(int(root) >= acknowledged and int(root) - int(data) in (0, 1),
                    f"the replica has {root} and {data}, and {acknowledged} were acknowledged")
        first, _ = told.wait("wrote", before)
        self.say(f"  pause {pause:.3f} s (source stopped → replica proven, started); {acknowledged} writes were acknowledged, the "
                 f"replica has {root} and {data}, all whole; {first - stopped_at:.1f} s between two acknowledged writes")
        return pause

    def hand_over(self, source, replica):
        """As `cut_over`, but the guest goes on in the replica, with its memory."""
        told = self.told[replica]
        before = len(told.lines)
        lines = self.run("failover", "complete", "guest")
        first, (_, number) = told.wait("wrote", before)
        time.sleep(0.1)
        stopped_at, acknowledged = self.told[source].last()
        self.expect(int(number) == acknowledged + 1, f"{acknowledged} was acknowledged, and then {number}")
        self.expect(told.lines[before][1][0] == "wrote", "the guest booted instead of going on")
        last = max(at for at, _ in self.beats[source].lines)
        gap = min(at for at, _ in self.beats[replica].lines if at > last) - last
        self.gaps.append(gap)
        self.say(f"  pause {lines[-1]['downtime_seconds']:.3f} s (source stopped → guest runs in the replica); {gap:.3f} s between two "
                 f"acknowledged writes of one page, {self.beats[source].pace('beat'):.3f} s otherwise; {first - stopped_at:.3f} s between "
                 f"numbers {acknowledged} and {number}, {self.told[source].pace('wrote'):.3f} s otherwise")

    def expect(self, holds, otherwise):
        if not holds:
            raise Broken(otherwise)

    def play(self):
        self.began = time.monotonic()
        version = subprocess.run(["qemu-system-x86_64", "--version"], text=True, capture_output=True).stdout
        self.say("a guest is made, for " + version.splitlines()[0])
        self.images()
        self.describe("cold")
        job = str(self.place / "guest.toml")
        self.told = {site: Told(site, "told") for site in (self.home, self.away)}
        self.beats = {site: Told(site, "beats") for site in (self.home, self.away)}
        home, away = self.told[self.home], self.told[self.away]
        start(self.home, self.place, [("raw", self.home / f"disk{n}") for n in range(len(DISKS))])
        home.wait("checked", 0)
        home.wait("wrote", 0)
        self.say("it works; passes while it does")
        self.run("failover", "start", job, "--until", "ready")
        self.say("cutover: the replica boots from what arrived")
        self.cut_over(self.home, self.away)
        for number in range(len(DISKS)):
            checked = subprocess.run(["e2fsck", "-fn", self.away / f"disk{number}"], capture_output=True, text=True)
            self.expect(checked.returncode == 0, f"e2fsck of disk {number}: {checked.stdout}")
        self.say("  e2fsck: both file systems are clean at the cut")

        seen = len(home.lines)
        self.run("failover", "rollback", "guest")
        home.wait("wrote", seen, 30)
        self.expect(all(line[0] == "wrote" for _, line in home.lines[seen:]), "the source booted instead of going on")
        for number in range(len(DISKS)):
            same = subprocess.run(["cmp", self.away / f"disk{number}", self.place / f"before{number}"])
            self.expect(same.returncode == 0, f"disk {number} is not what it was before the job")
        self.say("rolled back: the source goes on where it stood, the targets are what they were, bit for bit")

        self.say("cutover by its power button: the guest shuts down, and its replica boots")
        self.describe("cold", "power-down")
        self.run("failover", "start", job, "--until", "ready")
        began = time.monotonic()
        self.cut_over(self.home, self.away)
        self.say(f"  {time.monotonic() - began:.1f} s with the shutdown, which the pause is counted from the end of")
        seen = len(home.lines)
        self.run("failover", "rollback", "guest")
        home.wait("checked", seen)
        home.wait("wrote", seen)
        self.say("rolled back: the source booted again")

        self.say("cutover once more: the guest goes on in the replica, memory and all")
        self.describe("warm")
        self.run("failover", "start", job, "--until", "ready")
        self.hand_over(self.home, self.away)
        seen = len(away.lines)
        self.run("failover", "commit", "guest", "--live", "--release-source")
        away.wait("wrote", seen)
        self.expect(all(line[0] == "wrote" for _, line in away.lines[seen:]), "the replica booted instead of going on")
        end = time.monotonic() + 10
        while pid_of(self.home) and time.monotonic() < end:
            time.sleep(0.1)
        self.expect(pid_of(self.home) is None, "the source was let go and is still there")
        self.say("committed while it works: what it wrote on trial is merged, and it goes on; the source has ended")

        time.sleep(5)
        self.say("home again, with what changed since")
        lines = self.run("failover", "reverse", "guest", "--until", "ready")
        moved = sum(line["changed_bytes"] for line in lines if line.get("event") == "pass")
        size = sum((self.home / f"disk{n}").stat().st_size for n in range(len(DISKS)))
        self.expect(moved < size / 4, f"{moved} of {size} bytes travelled")
        self.expect(not [line for line in lines if line.get("type") == "warning"], "the way back was not watched")
        self.hand_over(self.away, self.home)
        seen = len(home.lines)
        self.run("failover", "commit", "guest", "--release-source")
        home.wait("checked", seen)
        home.wait("wrote", seen)
        self.say(f"home: {moved / 1e6:.1f} MB of {size / 1e6:.0f} MB travelled back, and all that was acknowledged is there")
        stop(self.home)
        median = {name: statistics.median(values) for name, values in [("points", self.points), ("gaps", self.gaps)]}
        self.say(f"in the median: {median['gaps']:.3f} s between two acknowledged writes in a hand-over of memory, "
                 f"{median['points'] * 1000:.0f} ms for a point of frozen file systems")

    def tidy(self):
        for site in (self.home, self.away):
            pid = pid_of(site)
            if pid:
                os.kill(pid, signal.SIGKILL)


def main():
    if sys.argv[1] == "hook":
        return hook(*sys.argv[2:5])
    program = Path(sys.argv[1]).resolve()
    wanted = sys.argv[2] if len(sys.argv) > 2 and sys.argv[2] else "/var/tmp"
    # The path of a socket has to be short.
    with tempfile.TemporaryDirectory(prefix="guest-", dir=wanted) as place:
        story = Story(program, Path(place).resolve())
        try:
            story.play()
        except Broken as broken:
            print(f"NOT HELD: {broken}", file=sys.stderr)
            for site in (story.home, story.away):
                console = site / "console"
                if console.exists():
                    print(f"-- {console}\n" + console.read_text(errors="replace")[-2000:], file=sys.stderr)
            return 1
        finally:
            story.tidy()
    print("All of it held.")
    return 0


sys.exit(main())
