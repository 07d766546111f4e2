# Rules of packages of our own would be included here. There are none; Buildroot wants the file all the same.
