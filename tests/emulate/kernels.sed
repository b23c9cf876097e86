# CUDA C to C++: launches, and variables in shared memory. The rest is emulate.h. Lines keep their numbers.
s/^( *)([A-Za-z_].*)<<<(.*)>>>\((.*)\);/\1emu_launch(\3, [emu_k = \2, emu_p = \4] { emu_k(emu_p); });/
s/^( *)extern __shared__ .*char ([a-z]+)\[\];/\1char *\2 = emu_dynamic();/
s/^( *)__shared__ ([a-z0-9_]+) ([a-z]+)(\[.*\])?;/\1static emu_shared<\2\4> emu_\3; auto \&\3 = emu_\3.here();/
