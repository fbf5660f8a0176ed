"""How the command line ends: signals, pipes, full disks, threads that are left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def after(command):
    """How a program ends whose command is this code."""
    imports = "import atexit, signal, sys, threading, time\nfrom res2net_jax import command_line"
    code = f"{imports}\ndef command(_):\n{command}\n"
    program = [sys.executable, "-c", f"{code}command_line.main(command)"]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("ending", "code"), [("return 4", 4), ("raise ValueError('full')", 2), ("return 0", 0)])
def test_abandoned_threads_are_not_waited_for(ending, code):
    ended = after(f"""
        threading.Thread(target=time.sleep, args=[600]).start()
        atexit.register(print, "in order")
        command_line.abandon_threads()
        {ending}""")
    assert (ended.returncode, ended.stdout) == (code, "in order\n")
    assert ended.stderr == ("error: full\n" if code == 2 else "")


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_ctrl_c_in_a_destructor_is_not_lost(seconds):
    """Also on a busy machine, where it takes ``seconds`` until a thread that was started lets us go on."""
    ended = after(f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
        start = threading.Thread.start
        threading.Thread.start = lambda thread: (start(thread), time.sleep({seconds}))
        class Late:
            def __del__(self):
                raise KeyboardInterrupt
        Late()
        time.sleep(600)""")
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_sigterm_is_not_lost_and_lets_the_clearing_up_end():
    ended = after("""
        import os
        class Late:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=time.sleep, args=[600]).start()
        Late()
        try:
            time.sleep(600)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            print("cleared up", flush=True)""")
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGTERM, "cleared up\n", "")


def test_what_commands_compile_is_kept_in_private(tmp_path):
    environment = os.environ | {"RES2NET_JAX_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    code = "import jax; from res2net_jax.backend import use_compilation_cache as use; use(); jax.jit(abs)(1)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    kept = tmp_path / "compiled"
    assert list(kept.iterdir()) and kept.stat().st_mode & 0o077 == 0


def start(*arguments, before=(), **options):
    """Another process, with pipes."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "res2net_jax", *map(str, arguments)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_that_leaves_early(folder, photos):
    process = start("predict", folder, *(photos * 20), "--batch-size", 2)
    assert process.stdout.readline().rstrip() == str(photos[0])
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.parametrize("form", ["predict", "explain"])
def test_a_reader_that_leaves_early_cuts_no_file_short(folder, photos, tmp_path, form):
    many = [tmp_path / f"{i}.jpg" for i in range(81)]
    for i, path in enumerate(many):
        path.symlink_to(photos[i % 2] if i < 80 else "/dev/null")  # the last is named on standard error
    output = {"predict": ["--json-lines", "-", "--html", tmp_path / "page.html"], "explain": ["--output", tmp_path]}
    process = start(form, folder, *many, *output[form], "--batch-size", 2)
    process.stderr.close()
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    if form == "predict":
        assert (tmp_path / "page.html").read_text().count('class="card"') == 80
    else:
        assert len(list(tmp_path.glob("*.png"))) == 80


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_without_a_word_and_leaves_nothing(folder, photos, tmp_path, signum):
    # Whoever runs the tests in the background has them ignore Ctrl-C, which a child would inherit.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    outputs = "--json-lines", "-", "--html", tmp_path / "page.html"
    process = start("predict", folder, *(photos * 500), *outputs, before=[sys.executable, "-c", heed])
    assert str(photos[0]) in process.stdout.readline()
    process.send_signal(signum)
    _, error = process.communicate()
    assert (process.returncode, error) == (-signum, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["--html", "stdout"])
def test_a_full_disk(folder, photos, tmp_path, form):
    if form == "stdout":
        with open("/dev/full", "w") as full:
            process = start("list", stdout=full)
            error = process.communicate()[1]
        assert "error: [Errno 28] No space left on device" in error
    else:
        limited = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # 20 kB
        process = start("predict", folder, *(photos * 4), "--html", tmp_path / "page.html", before=limited)
        error = process.communicate()[1]
        assert f"no space to write {tmp_path}/page.html; nothing was left behind" in error
    assert process.returncode == 2 and "Traceback" not in error and "Exception" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
def test_bash_completes_commands_and_options():
    process = start("--tyro-write-completion", "bash", "-")
    script, error = process.communicate()
    assert process.returncode == 0 and error == ""
    words = {"res2net_jax ''": "predict", "res2net_jax predict --js": "--json-lines", "res2net_jax ex": "explain"}
    for line, expected in words.items():
        ask = (
            f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); f=$(complete -p res2net_jax); f=${{f#*-F }}; "
        )
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{ask} ${{f%% *}}; printf '%s\\n' \"${{COMPREPLY[@]}}\""],
            capture_output=True,
            text=True,
        )
        assert expected in done.stdout.split(), (line, done)
